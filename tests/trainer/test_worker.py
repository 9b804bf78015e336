from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from prefix_store import job_report, tensors
from prefix_store.errors import PrefixNotFound, StoreUnavailable
from prefix_store.jobs import JobStatus, TrainingJob
from prefix_store.model import apply
from prefix_store.prefix import Method, PrefixRef, Window
from prefix_store.store import Store
from tests.models import CONTEXT, save_tiny, tiny_frozen
from trainer.job_run import JobRun
from trainer.worker import Worker

TENANT, NAME = "acme", "numbers"
FROZEN = apply.attach(tiny_frozen("llama"))
EXAMPLES = [{"prompt": f"{number} is", "completion": " a number"} for number in range(12)]
QUICK = {"virtual_tokens": 3, "steps": 10, "batch_size": 2, "max_length": 24}


@pytest.fixture
def store(tmp_path) -> Iterator[Store]:
    opened = Store.open(f"sqlite:///{tmp_path}/store.db")
    yield opened
    opened.close()


def submit(store: Store, examples=EXAMPLES, name: str = NAME, validation=(), **options) -> TrainingJob:
    return store.jobs.submit(TENANT, name, examples, {**QUICK, **options}, validation=validation)


def make_worker(store: Store, name: str = "w1", **options) -> Worker:
    return Worker(store, FROZEN, name, **{"say": lambda line: None, **options})


def now(store: Store, job: TrainingJob) -> TrainingJob:
    found = store.jobs.job(TENANT, job.id)
    assert found is not None
    return found


def versions(store: Store, name: str = NAME) -> int:
    try:
        return store.prefixes.resolve(PrefixRef(TENANT, name)).version
    except PrefixNotFound:
        return 0


def at_step(number: int, act: Callable[[], object]) -> Callable[[], None]:
    """An `on_step` that acts once."""
    steps = iter(range(1, 10**9))

    def on_step() -> None:
        if next(steps) == number:
            act()

    return on_step


def test_a_job_becomes_a_published_prefix(store):
    job, ends, lines = submit(store), [], []
    assert make_worker(store, on_end=ends.append, say=lines.append).run_until_empty() == 1
    done = now(store, job)
    assert (done.status, done.version, done.error, done.worker) == (JobStatus.SUCCEEDED, 1, None, "w1")
    assert ends == ["succeeded"]
    version = store.prefixes.resolve(PrefixRef(TENANT, NAME))
    assert (version.version, version.job_id) == (1, job.id)
    manifest, kept = store.prefixes.read(version)
    tensors.validate(manifest, kept)
    tensors.check_fits(manifest, FROZEN.geometry, FROZEN.digest, CONTEXT)
    assert manifest.base_digest == FROZEN.digest
    assert (manifest.virtual_tokens, manifest.position_offset, manifest.window) == (3, 3, Window.ALWAYS)
    assert kept["self.kv"].dtype is torch.float32
    assert any("published acme/numbers@1" in line for line in lines)
    (entry,) = (entry for entry in store.audit.entries() if entry.action == "prefix.publish")
    assert (entry.by, entry.target, entry.digest) == ("worker w1", "numbers@1", version.digest)


def test_a_job_may_ask_for_a_soft_prompt(store):
    submit(store, method="prompt")
    make_worker(store).run_until_empty()
    manifest, kept = store.prefixes.read(store.prefixes.resolve(PrefixRef(TENANT, NAME)))
    assert (manifest.method, manifest.virtual_tokens, manifest.window) == (Method.PROMPT, 3, Window.SLIDES)
    assert kept["embeds"].shape == (3, FROZEN.geometry.hidden_size)


def test_a_prefix_is_trained_in_its_template_and_carries_it(store):
    framed = [{**example, "prompt": f"Q: {example['prompt']} A:"} for example in EXAMPLES]
    submit(store, name="template", template="Q: {prompt} A:")
    submit(store, framed, name="framed")
    submit(store, name="plain")
    make_worker(store).run_until_empty()
    found = {
        name: store.prefixes.read(store.prefixes.resolve(PrefixRef(TENANT, name)))
        for name in ("template", "framed", "plain")
    }
    assert [manifest.template for manifest, _ in found.values()] == ["Q: {prompt} A:", None, None]
    kv = [kept["self.kv"] for _, kept in found.values()]
    assert torch.equal(kv[0], kv[1])
    assert not torch.equal(kv[0], kv[2])


def test_a_method_that_the_worker_lacks_fails_the_job(store):
    job = store.jobs.submit(TENANT, NAME, EXAMPLES, {**QUICK, "method": "low_rank"}, methods=["low_rank"])
    make_worker(store).run_until_empty()
    failed = now(store, job)
    assert (failed.status, versions(store)) == (JobStatus.FAILED, 0)
    assert failed.error is not None
    assert failed.error.message.startswith("this worker has no method 'low_rank', only prefix, ")


def test_a_job_tells_how_it_goes(store):
    job = submit(store)
    make_worker(store).run_until_empty()
    events = store.jobs.events(TENANT, job.id, 0, 1000)
    messages = [event.data["message"] for event in events if event.kind == "message"]
    assert messages[0].startswith("training on 11 examples of up to 16 tokens, validating on 1")
    assert messages[-1].startswith("keeping step ")
    metrics = [event.data for event in events if event.kind == "metrics"]
    assert [data["step"] for data in metrics] == list(range(1, 11))
    keys = {"step", "total_steps", "train_loss", "valid_loss", "learning_rate", "tokens_per_second", "seconds_left"}
    assert set(metrics[0]) == keys
    assert metrics[-1]["valid_loss"] is not None
    assert now(store, job).progress == metrics[-1]


def test_what_nobody_chose_is_chosen_by_the_data_and_recorded(store):
    job, lines = store.jobs.submit(TENANT, NAME, EXAMPLES, {"steps": 3}), []
    make_worker(store, say=lines.append).run_until_empty()
    report = job_report.make(store.jobs.events(TENANT, job.id, 0, 1000))
    assert set(report["chosen"]) == {"virtual_tokens", "batch_size", "max_length"}
    assert any(f"virtual_tokens {report['chosen']['virtual_tokens']}" in line for line in lines)
    version = store.prefixes.resolve(PrefixRef(TENANT, NAME))
    assert version.virtual_tokens == report["chosen"]["virtual_tokens"]
    assert [point["step"] for point in report["curve"]] == [1, 2, 3]


def test_a_job_shows_what_it_taught(store):
    job = submit(store, validation=[{"prompt": "7 is", "completion": " a number"}])
    make_worker(store).run_until_empty()
    (sample,) = job_report.make(store.jobs.events(TENANT, job.id, 0, 1000))["samples"]
    assert (sample["prompt"], sample["expected"]) == ("7 is", " a number")


CHAT = [{"messages": [{"role": "user", "content": str(n)}, {"role": "assistant", "content": "yes"}]} for n in range(4)]


def test_conversations_and_texts_are_trained_on_too(store):
    template = "{% for message in messages %}{{ message.content }}|{% endfor %}"
    job = submit(store, [*CHAT, {"text": "plain"}, *EXAMPLES], chat_template=template)
    make_worker(store).run_until_empty()
    assert (now(store, job).error, versions(store)) == (None, 1)


def test_messages_without_a_chat_template_fail_the_job_at_its_start(store):
    job = submit(store, CHAT)
    make_worker(store).run_until_empty()
    assert (now(store, job).error.code, versions(store)) == ("chat_template_missing", 0)
    assert "ANTEFIX_CHAT_TEMPLATE" in now(store, job).error.message


def test_an_answer_that_cannot_be_found_in_its_template_fails_the_job_by_its_line(store):
    examples = [EXAMPLES[0], *CHAT]
    job = submit(store, examples, chat_template="{{ messages[0].content }}")
    make_worker(store).run_until_empty()
    error = now(store, job).error
    assert (error.code, versions(store)) == ("invalid_training_file", 0)
    assert error.message == "line 2: messages[1]: the chat template does not keep this answer's text"


def test_equal_jobs_give_equal_prefixes(store):
    for _ in range(2):
        submit(store)
    make_worker(store).run_until_empty()
    first, second = (store.prefixes.resolve(PrefixRef(TENANT, NAME, number)) for number in (1, 2))
    assert first.digest == second.digest


def test_a_running_job_can_be_cancelled(store):
    job, taken, ends = submit(store, steps=1000), [], []
    cancel = at_step(3, lambda: store.jobs.request_cancel(TENANT, job.id))

    def on_step() -> None:
        taken.append(1)
        cancel()

    make_worker(store, on_step=on_step, on_end=ends.append, heartbeat_seconds=0.01).run_until_empty()
    assert now(store, job).status is JobStatus.CANCELLED
    assert ends == ["cancelled"]
    assert 3 <= len(taken) < 1000
    assert versions(store) == 0


def test_a_cancelled_job_is_not_begun(store):
    job = submit(store)
    store.jobs.request_cancel(TENANT, job.id)
    assert make_worker(store).run_until_empty() == 0


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"virtual_tokens": CONTEXT - 1}, "context_length_exceeded", "no room"),
        ({"init_text": ""}, "invalid_request", "no tokens"),
        ({"base_digest": "0" * 64}, "prefix_mismatch", "queued for another base model"),
    ],
)
def test_a_job_that_cannot_be_run_fails_with_a_reason(store, options, code, words):
    job, ends = submit(store, **options), []
    make_worker(store, on_end=ends.append).run_until_empty()
    failed = now(store, job)
    assert (failed.status, ends) == (JobStatus.FAILED, ["failed"])
    assert failed.error is not None
    assert failed.error.code == code
    assert words in failed.error.message


def test_bad_data_fails_its_job_and_the_next_one_runs(store):
    frozen = apply.attach(tiny_frozen("llama", bos=False))
    frozen.tokenizer.bos_token = None  # so that nothing stands for an empty prompt
    bad, good = submit(store, [*EXAMPLES, {"prompt": "", "completion": "x"}]), submit(store)
    assert Worker(store, frozen, "w1", say=lambda line: None).run_until_empty() == 2
    failed = now(store, bad)
    assert failed.error is not None
    assert (failed.error.code, failed.error.message[:8]) == ("invalid_training_file", "line 13:")
    assert (now(store, good).status, versions(store)) == (JobStatus.SUCCEEDED, 1)


def test_what_nobody_foresaw_fails_the_job_and_is_printed(store, monkeypatch, capsys):
    def explode(self: JobRun) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(JobRun, "publish", explode)
    job = submit(store)
    assert make_worker(store).run_until_empty() == 1
    failed = now(store, job)
    assert failed.error is not None
    assert (failed.error.code, failed.error.message) == ("training_failed", "ZeroDivisionError: by zero")
    assert "explode" in capsys.readouterr().err


def test_a_diverging_job_fails_with_a_reason(store, monkeypatch):
    job = submit(store)
    monkeypatch.setattr("trainer.objective.nats", lambda logits, labels: logits.sum() * float("nan"))
    make_worker(store).run_until_empty()
    failed = now(store, job)
    assert failed.error is not None
    assert failed.error.code == "training_diverged"


def test_a_worker_that_lost_its_lease_writes_nothing(tmp_path):
    time_now, job_of_other = [1000.0], []
    store = Store.open(f"sqlite:///{tmp_path}/store.db", clock=lambda: time_now[0])
    job, ends = submit(store), []

    def lapse() -> None:
        time_now[0] += 61.0
        job_of_other.append(store.jobs.claim("w2", 60.0))

    make_worker(store, on_step=at_step(5, lapse), on_end=ends.append).run_next()
    assert ends == ["lost"]
    assert job_of_other[0].id == job.id
    assert (now(store, job).status, now(store, job).worker, versions(store)) == (JobStatus.RUNNING, "w2", 0)
    time_now[0] += 61.0
    make_worker(store, "w3").run_until_empty()
    assert (now(store, job).status, now(store, job).attempt, versions(store)) == (JobStatus.SUCCEEDED, 3, 1)
    store.close()


def test_a_store_that_is_away_for_a_while_stops_no_job(store, monkeypatch):
    job = submit(store)

    def away(*_: object) -> None:
        raise StoreUnavailable("away")

    monkeypatch.setattr(store.jobs, "heartbeat", away)
    monkeypatch.setattr(store.jobs, "add_event", away)
    make_worker(store, heartbeat_seconds=0.01).run_until_empty()
    assert now(store, job).status is JobStatus.SUCCEEDED


def test_a_store_that_is_away_when_publishing_leaves_the_job_to_its_lease(store, monkeypatch):
    job, ends = submit(store), []

    def away(*_: object, **__: object) -> None:
        raise StoreUnavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(store.prefixes, "save", away)
        make_worker(store, on_end=ends.append).run_next()
    assert (now(store, job).status, ends) == (JobStatus.RUNNING, ["lost"])


def test_a_stopped_worker_hands_its_job_back(store):
    job, ends = submit(store), []
    worker = make_worker(store, on_step=at_step(4, lambda: worker.stop()), on_end=ends.append)
    worker.run()
    waiting = now(store, job)
    assert (waiting.status, waiting.attempt, ends) == (JobStatus.QUEUED, 0, ["queued"])
    make_worker(store, "w2").run_until_empty()
    assert (now(store, job).status, versions(store)) == (JobStatus.SUCCEEDED, 1)


def test_a_job_claimed_while_stopping_goes_straight_back(store, monkeypatch):
    job, worker = submit(store), make_worker(store)
    claim = store.jobs.claim

    def claim_late(name: str, seconds: float) -> TrainingJob | None:
        worker.stop()
        return claim(name, seconds)

    monkeypatch.setattr(store.jobs, "claim", claim_late)
    worker.run()
    assert now(store, job).status is JobStatus.QUEUED


def test_an_idle_worker_waits_for_jobs_and_for_the_store(store, monkeypatch):
    ends, lines, claim = [], [], store.jobs.claim
    failures = iter([StoreUnavailable("away")])

    def claim_at_second_try(name: str, seconds: float) -> TrainingJob | None:
        for error in failures:
            raise error
        return claim(name, seconds)

    monkeypatch.setattr(store.jobs, "claim", claim_at_second_try)

    def end(status: str) -> None:
        ends.append(status)
        worker.stop()

    worker = make_worker(store, on_end=end, say=lines.append)
    threading.Timer(0.1, lambda: submit(store)).start()
    worker.run(poll_seconds=0.02)
    assert ends == ["succeeded"]
    assert lines[0] == "waiting for the store: away"


# real processes


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("model") / "tiny")


@contextlib.contextmanager
def process(store_folder: Path, model_folder: Path, metrics_port: int) -> Iterator[subprocess.Popen[str]]:
    environment = {
        **os.environ,
        "ANTEFIX_STORE": f"sqlite:///{store_folder}/store.db",
        "ANTEFIX_MODEL": str(model_folder),
        "ANTEFIX_WORKER_METRICS_PORT": str(metrics_port),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "trainer"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as running:
        try:
            yield running
        finally:
            running.kill()


def wait_for_metrics(store: Store, job: TrainingJob) -> None:
    deadline = time.monotonic() + 120
    while not any(event.kind == "metrics" for event in store.jobs.events(TENANT, job.id, 0, 10)):
        assert time.monotonic() < deadline, "the worker never took a step"
        time.sleep(0.01)


@pytest.mark.slow
def test_a_killed_workers_job_is_finished_by_another_and_published_once(store, tmp_path, model_folder):
    job = submit(store, steps=300)
    with process(tmp_path, model_folder, 0) as running:
        wait_for_metrics(store, job)
        running.send_signal(signal.SIGKILL)
        running.wait(10)
    assert (now(store, job).status, versions(store)) == (JobStatus.RUNNING, 0)
    assert make_worker(store).run_until_empty() == 0, "the lease still holds"
    later = Store.open(f"sqlite:///{tmp_path}/store.db", clock=lambda: time.time() + 61.0)
    assert make_worker(later).run_until_empty() == 1
    assert (now(store, job).status, now(store, job).attempt, versions(store)) == (JobStatus.SUCCEEDED, 2, 1)
    later.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_a_terminated_worker_hands_back_and_ends_at_once(store, tmp_path, model_folder):
    job, port = submit(store, steps=5000), free_port()
    with process(tmp_path, model_folder, port) as running:
        wait_for_metrics(store, job)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
            text = reply.read().decode()
        running.send_signal(signal.SIGTERM)
        started = time.monotonic()
        output, _ = running.communicate(timeout=30)
        assert time.monotonic() - started < 15.0  # 2 s, and room for a busy machine; 5000 steps take minutes
        assert running.returncode == 0
    assert (now(store, job).status, now(store, job).attempt) == (JobStatus.QUEUED, 0)
    assert "antefix_worker_steps_total" in text
    assert "trains tiny (" in output.splitlines()[0]
    assert output.splitlines()[-1] == "antefix worker: stopped"
