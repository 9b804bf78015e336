from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from itertools import count, groupby, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from prefix_store import job_report, tensors
from prefix_store.errors import PayloadTooLarge, PrefixNotFound, StoreUnavailable
from prefix_store.jobs import JobStatus, TrainingJob, TrainingSpec
from prefix_store.model import apply
from prefix_store.model.example import Example, ExampleEncoder
from prefix_store.prefix import Method, PrefixRef, PrefixVersion, Window
from prefix_store.store import Store
from tests.models import CONTEXT, save_tiny, tiny_frozen
from trainer import data, forward, memory
from trainer.job_run import TURN_SECONDS, JobRun
from trainer.methods import METHODS, size
from trainer.worker import SHARE, Worker

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


def said(store: Store, job: TrainingJob) -> list[str]:
    """What its owner was told."""
    events = store.jobs.events(TENANT, job.id, 0, 1000)
    return [event.data["message"] for event in events if event.kind == "message"]


def kept(store: Store, name: str = NAME) -> torch.Tensor:
    """The published prefix."""
    _, found = store.prefixes.read(store.prefixes.resolve(PrefixRef(TENANT, name)))
    return found["self.kv"]


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


def test_jobs_for_another_model_or_method_wait_for_the_worker_that_has_it(store):
    other = apply.attach(tiny_frozen("gpt2"))
    rank = store.jobs.submit(TENANT, "rank", EXAMPLES, {**QUICK, "method": "low_rank"}, methods=["low_rank"])
    theirs = submit(store, name="theirs", base_digest=other.digest)
    ours = submit(store, name="ours", base_digest=FROZEN.digest)
    lines: list[str] = []
    assert make_worker(store, say=lines.append).run_until_empty() == 1
    assert [now(store, job).status for job in (rank, theirs, ours)] == ["queued", "queued", "succeeded"]
    assert lines.count("jobs that wait for a worker with another model or method: 2") == 1
    methods = {**METHODS, "low_rank": METHODS["prefix"]}
    assert Worker(store, other, "w2", methods=methods, say=lines.append).run_until_empty() == 2
    assert [now(store, job).status for job in (rank, theirs)] == ["succeeded", "succeeded"]


def test_an_idle_worker_says_once_what_waits_for_others(store, monkeypatch):
    job, lines, looks, claim = submit(store, base_digest="0" * 64), [], [], store.jobs.claim

    def look(*given: Any) -> TrainingJob | None:
        looks.append(1)
        if len(looks) == 4:
            store.jobs.request_cancel(TENANT, job.id)
        if len(looks) == 8:
            worker.stop()
        return claim(*given)

    monkeypatch.setattr(store.jobs, "claim", look)
    worker = make_worker(store, say=lines.append)
    worker.run(poll_seconds=0.01)
    assert lines == [f"jobs that wait for a worker with another model or method: {count}" for count in (1, 0)]


def test_a_store_that_is_slow_keeps_an_idle_worker_from_no_job_for_long(store, monkeypatch):
    asked, clock = [], count(step=100.0)  # every look at it is minutes later

    def look(*_: Any) -> None:
        asked.append(time.monotonic())
        if len(asked) == 2:
            worker.stop()

    monkeypatch.setattr(store.jobs, "claim", look)
    monkeypatch.setattr("trainer.worker.ASK_SECONDS_MOST", 0.2)
    worker = make_worker(store, clock=lambda: next(clock))
    worker.run(poll_seconds=0.001)
    assert 0.2 <= asked[1] - asked[0] < 2


@pytest.mark.parametrize("is_busy", [False, True])
def test_a_worker_asks_less_often_where_asking_takes_long(store, monkeypatch, is_busy):
    """As it does where thousands wait for others: it is to train, and to leave the store in peace."""
    asked, ended, claim = [], [], store.jobs.claim

    def slow(*given: Any) -> TrainingJob | None:
        asked.append(time.monotonic())
        if len(asked) == 3 and not is_busy:
            worker.stop()
        found = claim(*given)
        if found is None:
            time.sleep(0.02)
            ended.append(time.monotonic())
        return found

    monkeypatch.setattr(store.jobs, "claim", slow)
    monkeypatch.setattr("trainer.worker.ASK_SECONDS", 0.0)
    if is_busy:
        submit(store, steps=200)
    worker = make_worker(store, on_step=lambda: len(ended) > 2 and worker.stop())
    worker.run(poll_seconds=0.001)
    begun = asked[is_busy:]  # the first finds a job
    waits = [later - earlier for earlier, later in zip(ended[:2], begun[1:3], strict=True)]
    assert min(waits) > 0.9 * 0.02 / 0.05


def test_a_job_tells_how_it_goes(store):
    job = submit(store)
    make_worker(store).run_until_empty()
    events = store.jobs.events(TENANT, job.id, 0, 1000)
    messages = [event.data["message"] for event in events if event.kind == "message"]
    assert messages[0].startswith("training on 11 examples of up to 16 tokens, validating on 1")
    assert re.fullmatch(r"keeping .*: validation loss \S+ before, \S+ after, \S+ without a prefix", messages[-1])
    metrics = [event.data for event in events if event.kind == "metrics"]
    assert [data["step"] for data in metrics] == list(range(1, 11))
    keys = {"step", "total_steps", "train_loss", "valid_loss", "learning_rate", "tokens_per_second", "seconds_left"}
    assert set(metrics[0]) == keys | {"trained_tokens"}
    assert metrics[-1]["valid_loss"] is not None
    shown = [data["trained_tokens"] for data in metrics]
    assert shown == sorted(set(shown))
    (kept,) = (event.data["kept"] for event in events if "kept" in event.data)
    assert kept["valid_loss"] == min(data["valid_loss"] for data in metrics if data["step"] == kept["step"])
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
    job = submit(store, validation=[{"prompt": "7 is", "completion": " odd"}])
    make_worker(store).run_until_empty()
    (sample,) = job_report.make(store.jobs.events(TENANT, job.id, 0, 1000))["samples"]
    assert (sample["prompt"], sample["expected"]) == ("7 is", " odd")


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
        ({"stacks": ["encoder"]}, "invalid_request", "a model without an encoder has only self"),
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
    def explode(self: JobRun, loss: float) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(JobRun, "stepped", explode)
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

    make_worker(store, on_step=at_step(5, lapse), on_end=ends.append).run_until_empty()
    assert ends == ["lost"]
    assert job_of_other[0].id == job.id
    assert (now(store, job).status, now(store, job).worker, versions(store)) == (JobStatus.RUNNING, "w2", 0)
    time_now[0] += 61.0
    make_worker(store, "w3").run_until_empty()
    assert (now(store, job).status, now(store, job).attempt, versions(store)) == (JobStatus.SUCCEEDED, 3, 1)
    store.close()


def test_a_worker_that_was_slow_to_beat_may_claim_its_own_job_again_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.worker.ASK_SECONDS", 0.0)
    monkeypatch.setattr("trainer.worker.ASK_SHARE", 1.0)
    time_now = [1000.0]
    store = Store.open(f"sqlite:///{tmp_path}/store.db", clock=lambda: time_now[0])
    job, steps = submit(store), []

    def on_step() -> None:
        steps.append(1)
        time_now[0] += 61.0 if len(steps) == 5 else 0.0

    ends: list[str] = []
    make_worker(store, on_step=on_step, on_end=ends.append).run_until_empty()
    assert (now(store, job).status, now(store, job).attempt, versions(store)) == (JobStatus.SUCCEEDED, 2, 1)
    assert (len(steps), ends) == (10, ["succeeded"])
    store.close()


def test_a_store_that_is_away_for_a_while_stops_no_job(store, monkeypatch):
    job = submit(store)

    def away(*_: object) -> None:
        raise StoreUnavailable("away")

    monkeypatch.setattr(store.jobs, "heartbeat", away)
    monkeypatch.setattr(store.jobs, "add_event", away)
    make_worker(store, heartbeat_seconds=0.01).run_until_empty()
    assert now(store, job).status is JobStatus.SUCCEEDED


# trained, and the store cannot take it


@pytest.fixture
def refusing(store, monkeypatch) -> Iterator[list[str]]:
    """The names whose prefixes the store cannot take, as long as they are there."""
    names, save = [NAME], store.prefixes.save

    def refuse(tenant: str, name: str, *others: object, **options: object) -> PrefixVersion:
        if name in names:
            raise StoreUnavailable("no space left")
        return save(tenant, name, *others, **options)

    monkeypatch.setattr(store.prefixes, "save", refuse)
    monkeypatch.setattr("trainer.publication.RETRY_SECONDS", 0.1)
    monkeypatch.setattr("trainer.worker.ASK_SECONDS", 0.02)
    return names


WAITS = "trained, and waiting for the store to take its prefix: "


def test_a_prefix_is_published_when_its_folder_is_there_again(store, monkeypatch):
    monkeypatch.setattr("trainer.publication.RETRY_SECONDS", 0.1)
    monkeypatch.setattr("trainer.worker.ASK_SECONDS", 0.02)
    folder, job, ends, lines, turns = store.blobs.root / "tmp", submit(store), [], [], []
    away = folder.with_name("away")

    def say(line: str) -> None:
        lines.append(line)
        if WAITS in line:
            turns.clear()
            threading.Timer(0.5, away.rename, [folder]).start()

    worker = make_worker(store, on_step=at_step(10, lambda: folder.rename(away)), on_end=ends.append, say=say)
    turn = worker._turn
    monkeypatch.setattr(worker, "_turn", lambda: turns.append(1) or turn())
    worker.run_until_empty()
    done = now(store, job)
    assert (done.status, done.attempt, done.lapses, versions(store)) == (JobStatus.SUCCEEDED, 1, 0, 1)
    assert ends == ["succeeded"]
    told = [line for line in said(store, job) if line.startswith(WAITS)]
    assert len(told) == len([line for line in lines if WAITS in line]) == 1
    assert str(folder) in told[0]
    assert len(turns) < 60, "it has slept in between"


def test_who_waits_for_the_store_keeps_nobody_waiting(store, refusing):
    waiting, other = submit(store), submit(store, name="other", steps=30)
    beside: list[set[str]] = []

    def look() -> None:
        beside.append({run.job.name for run in worker._runs})
        late()

    late = at_step(45, refusing.clear)  # 10 of the one, and 30 of the other and five of one that came later
    worker, _ = watched(store, look)
    submit(store, name="later", steps=20, batch_size=4)
    worker._room.budget = worker._room.limit = cost() + cost(batch_size=4)
    worker.run_until_empty()
    assert {now(store, job).status for job in (waiting, other)} == {JobStatus.SUCCEEDED}
    assert {NAME, "other", "later"} in beside, "it takes no step, and so no room"


@pytest.mark.parametrize("wish", ["cancel", "pause", "stop", "lose"])
def test_who_waits_for_the_store_can_be_taken_away(store, refusing, wish):
    submit(store, name="whole")
    make_worker(store).run_until_empty()
    job, ends = submit(store), []

    def strike() -> None:
        acts = {
            "cancel": lambda: store.jobs.request_cancel(TENANT, job.id),
            "pause": lambda: store.jobs.request_pause(TENANT, job.id),
            "stop": worker.stop,
            "lose": lambda: store.jobs.finish(worker._runs[0].job, JobStatus.PAUSED, None),
        }
        acts[wish]()

    worker = make_worker(
        store,
        say=lambda line: strike() if WAITS in line else None,
        on_end=ends.append,
        heartbeat_seconds=0.01,
    )
    worker.run_until_empty()
    found = now(store, job)
    expected = {"cancel": "cancelled", "pause": "paused", "stop": "queued", "lose": "paused"}[wish]
    assert (found.status.value, ends) == (expected, ["lost" if wish == "lose" else expected])
    refusing.clear()
    if wish == "cancel":
        return
    if wish != "stop":
        store.jobs.resume(TENANT, job.id)
    make_worker(store, "w2").run_until_empty()
    assert (now(store, job).status, now(store, job).lapses) == (JobStatus.SUCCEEDED, 0)
    assert torch.equal(kept(store), kept(store, "whole"))
    if wish != "lose":
        metrics = [event for event in store.jobs.events(TENANT, job.id, 0, 1000) if event.kind == "metrics"]
        assert sorted(event.data["step"] for event in metrics) == list(range(1, 11)), "it was trained once"


def test_a_suspect_that_waits_for_the_store_lets_others_in(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.publication.RETRY_SECONDS", 0.1)
    monkeypatch.setattr("trainer.worker.ASK_SECONDS", 0.0)
    monkeypatch.setattr("trainer.worker.ASK_SHARE", 1.0)
    time_now = [1000.0]
    store = Store.open(f"sqlite:///{tmp_path}/store.db", clock=lambda: time_now[0])
    suspect = submit(store)
    store.jobs.claim("dead", 60.0)
    time_now[0] += 61.0
    other, save = submit(store, name="other"), store.prefixes.save

    def refuse(tenant: str, name: str, *others: object, **options: object) -> PrefixVersion:
        if versions(store, "other") == 0 and name == NAME:
            raise StoreUnavailable("away")
        return save(tenant, name, *others, **options)

    monkeypatch.setattr(store.prefixes, "save", refuse)
    monkeypatch.setattr(store.jobs, "save_checkpoint", lambda *_: refuse(TENANT, NAME))
    make_worker(store).run_until_empty()
    assert {now(store, job).status for job in (suspect, other)} == {JobStatus.SUCCEEDED}
    store.close()


def test_a_worker_without_heartbeats_ends(store, monkeypatch):
    job = submit(store, steps=10_000)

    def beat(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(store.jobs, "heartbeat", beat)
    with pytest.raises(ZeroDivisionError):
        make_worker(store, heartbeat_seconds=0.05).run_until_empty()
    assert now(store, job).status is JobStatus.RUNNING, "another worker may have it when its lease has lapsed"


def test_a_stopped_worker_hands_its_job_back(store):
    job, ends = submit(store), []
    worker = make_worker(store, on_step=at_step(4, lambda: worker.stop()), on_end=ends.append)
    worker.run()
    waiting = now(store, job)
    assert (waiting.status, waiting.attempt, ends) == (JobStatus.QUEUED, 0, ["queued"])
    assert waiting.checkpoint is not None
    make_worker(store, "w2").run_until_empty()
    assert (now(store, job).status, versions(store)) == (JobStatus.SUCCEEDED, 1)
    assert "going on from step 4" in said(store, job)


def test_a_step_that_takes_too_long_is_not_waited_for(store, monkeypatch):
    monkeypatch.setattr("trainer.worker.ASK_SECONDS", 0.0)  # so that it is asked for while its old run is still there
    monkeypatch.setattr("trainer.worker.ASK_SHARE", 1.0)
    job, ends = submit(store), []
    worker = make_worker(store, on_step=at_step(4, lambda: worker.hand_back()), on_end=ends.append)
    worker.run_until_empty()
    assert (ends, now(store, job).attempt) == (["queued", "succeeded"], 1)


def test_a_job_claimed_while_stopping_goes_straight_back(store, monkeypatch):
    job, worker = submit(store), make_worker(store)
    claim = store.jobs.claim

    def claim_late(*given: Any) -> TrainingJob | None:
        worker.stop()
        return claim(*given)

    monkeypatch.setattr(store.jobs, "claim", claim_late)
    worker.run()
    assert now(store, job).status is JobStatus.QUEUED


def test_an_idle_worker_waits_for_jobs_and_for_the_store(store, monkeypatch):
    ends, lines, claim = [], [], store.jobs.claim
    failures = iter([StoreUnavailable("away")])

    def claim_at_second_try(*given: Any) -> TrainingJob | None:
        for error in failures:
            raise error
        return claim(*given)

    monkeypatch.setattr(store.jobs, "claim", claim_at_second_try)

    def end(status: str) -> None:
        ends.append(status)
        worker.stop()

    worker = make_worker(store, on_end=end, say=lines.append)
    threading.Timer(0.1, lambda: submit(store)).start()
    worker.run(poll_seconds=0.02)
    assert ends == ["succeeded"]
    assert lines[0] == "waiting for the store: away"


# interrupted


def stop_after(store: Store, steps: int) -> None:
    """A worker that is told to stop after so many steps."""
    worker = make_worker(store, on_step=at_step(steps, lambda: worker.stop()))
    worker.run()


@pytest.mark.parametrize("after", [1, 4, 9])
def test_an_interrupted_job_ends_with_the_bytes_of_an_undisturbed_one(store, after):
    submit(store, name="whole")
    make_worker(store).run_until_empty()
    job = submit(store, name="cut")
    stop_after(store, after)
    assert now(store, job).status is JobStatus.QUEUED
    make_worker(store, "w2").run_until_empty()
    assert len({store.prefixes.resolve(PrefixRef(TENANT, name)).digest for name in ("whole", "cut")}) == 1
    metrics = [event for event in store.jobs.events(TENANT, job.id, 0, 1000) if event.kind == "metrics"]
    assert sorted(event.data["step"] for event in metrics) == list(range(1, 11)), "no step was taken twice"


def test_a_checkpoint_goes_with_its_job(store):
    job = submit(store)
    stop_after(store, 4)
    before = now(store, job).checkpoint
    stop_after(store, 3)
    after = now(store, job).checkpoint
    assert before not in (None, after)
    assert before not in set(store.blobs.digests()), "the one before it is removed at once"
    make_worker(store).run_until_empty()
    assert now(store, job).checkpoint is None
    assert store.collect() == 1


@pytest.mark.parametrize("damage", ["blob", "state"])
def test_a_checkpoint_that_cannot_be_used_costs_only_the_steps(store, damage):
    job = submit(store)
    stop_after(store, 4)
    claimed = store.jobs.claim("w", 60.0)
    if damage == "state":
        store.jobs.save_checkpoint(claimed, b"something else")
    else:
        store.blobs.remove_unless(claimed.checkpoint, lambda: False)
    store.jobs.finish(claimed, JobStatus.QUEUED, None)
    make_worker(store).run_until_empty()
    assert now(store, job).status is JobStatus.SUCCEEDED
    assert any("begins anew" in line for line in said(store, job))


def test_a_checkpoint_that_the_store_cannot_hold_costs_only_safety(store, monkeypatch):
    def refuse(*_: object) -> None:
        raise PayloadTooLarge("at most 256 MB")

    monkeypatch.setattr(store.jobs, "save_checkpoint", refuse)
    job = submit(store)
    make_worker(store, checkpoint_seconds=0.0).run_until_empty()
    assert now(store, job).status is JobStatus.SUCCEEDED
    assert any(re.fullmatch(r"no checkpoint of step \d+: at most 256 MB", line) for line in said(store, job))


def test_a_running_job_rests_and_goes_on(store):
    submit(store, name="whole")
    make_worker(store).run_until_empty()
    job, ends = submit(store, name="rested"), []
    pause = at_step(4, lambda: store.jobs.request_pause(TENANT, job.id))

    def on_step() -> None:
        pause()
        time.sleep(0.1)  # several heartbeats

    make_worker(store, on_step=on_step, on_end=ends.append, heartbeat_seconds=0.01).run_until_empty()
    rested = now(store, job)
    assert (rested.status, rested.pause_requested, ends) == (JobStatus.PAUSED, False, ["paused"])
    assert make_worker(store).run_until_empty() == 0
    store.jobs.resume(TENANT, job.id)
    make_worker(store).run_until_empty()
    assert torch.equal(kept(store, "rested"), kept(store, "whole"))
    assert any(line.startswith("going on from step") for line in said(store, job))


# many at once


def watched(store: Store, also: Callable[[], object] = lambda: None, **options) -> tuple[Worker, list[set[str]]]:
    """A worker, and who trained with it at each step of a job."""
    together: list[set[str]] = []

    def on_step() -> None:
        together.append({run.job.name for run in worker._runs if not run.is_trained})
        also()

    worker = make_worker(store, on_step=on_step, **options)
    return worker, together


def test_jobs_in_one_step_end_as_they_would_alone(store):
    options = [{}, {"virtual_tokens": 5, "seed": 3}, {"batch_size": 4, "steps": 7}, {"learning_rate": 0.3, "steps": 13}]
    for number, option in enumerate(options):
        submit(store, name=f"alone-{number}", **option)
        make_worker(store).run_until_empty()
    for number, option in enumerate(options):
        submit(store, EXAMPLES[: 12 - number % 2], name=f"other-{number}", **option)  # neighbours with other data
        submit(store, name=f"packed-{number}", **option)
    worker, together = watched(store)
    assert worker.run_until_empty() == 2 * len(options)
    assert max(map(len, together)) == 2 * len(options)
    for number in range(len(options)):
        torch.testing.assert_close(kept(store, f"packed-{number}"), kept(store, f"alone-{number}"), atol=1e-5, rtol=0)


def test_new_jobs_are_admitted_between_steps(store, monkeypatch):
    monkeypatch.setattr("trainer.worker.ASK_SECONDS", 0.0)
    monkeypatch.setattr("trainer.worker.ASK_SHARE", 1.0)
    submit(store, name="first")
    worker, together = watched(store, at_step(4, lambda: submit(store, name="late")))
    assert worker.run_until_empty() == 2
    assert together[3] == {"first"}
    assert {"first", "late"} in together
    assert together[-1] == {"late"}


def test_who_validates_keeps_nobody_waiting(store):
    submit(store, EXAMPLES * 8, name="slow", batch_size=1)  # nine slices for the bare model, and nine for the start
    submit(store, name="quick", steps=40)
    seen: list[dict[str, tuple[int, bool]]] = []

    def look() -> None:
        seen.append({run.job.name: (run.tuning.step, run.validation is None) for run in worker._runs})

    worker, _ = watched(store, look)
    worker.run_until_empty()
    meanwhile = [state["quick"][0] for state in seen if state.get("slow") == (0, False) and "quick" in state]
    assert max(meanwhile) >= 8


@contextlib.contextmanager
def reading(heard: Callable[[int], object]) -> Iterator[None]:
    """Tells of the tokens of every forward that learns nothing."""

    def tell(model: torch.nn.Module, inputs: object, options: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            heard(options["input_ids"].numel())

    hook = FROZEN.model.base_model.register_forward_pre_hook(tell, with_kwargs=True)
    yield
    hook.remove()


def test_who_makes_samples_keeps_nobody_waiting(store):
    """On a clock that steps (100 ms) and what is read without learning from it (1 ms a token) move."""
    time_now, steps = [0.0], []

    def advance(seconds: float) -> None:
        time_now[0] += seconds

    judges = [{"prompt": f"{number} is what it is", "completion": " a number"} for number in range(5)]
    shown = submit(store, name="shown", validation=judges, steps=2)
    submit(store, name="other", steps=60)

    def on_step() -> None:
        steps.append(time_now[0])
        advance(0.1)

    worker = make_worker(store, on_step=on_step, clock=lambda: time_now[0])
    with reading(lambda tokens: advance(0.001 * tokens)):
        worker.run_until_empty()
    assert len(job_report.make(store.jobs.events(TENANT, shown.id, 0, 1000))["samples"]) == 5
    assert max(after - before for before, after in pairwise(steps)) <= 0.3, "all samples at once take some ten seconds"


def test_a_job_that_makes_samples_can_be_cancelled(store, monkeypatch):
    monkeypatch.setattr("trainer.worker.SLICE_SECONDS", 0.0)
    judges = [{"prompt": f"{number} is", "completion": " a number"} for number in range(5)]
    job, ends, read = submit(store, validation=judges, steps=2), [], []

    def slowly(tokens: int) -> None:
        if all(run.tuning.step == 2 and run.validation is None for run in worker._runs):
            read.append(tokens)
            len(read) == 3 and store.jobs.request_cancel(TENANT, job.id)
            time.sleep(0.02)  # several heartbeats

    worker = make_worker(store, on_end=ends.append, heartbeat_seconds=0.005)
    with reading(slowly):
        worker.run_until_empty()
    assert (ends, now(store, job).status) == (["cancelled"], JobStatus.CANCELLED)
    assert len(read) < 30


def cost(**options) -> int:
    """What a job of ours takes in memory, by the worker's estimate."""
    spec = TrainingSpec("0" * 64, len(EXAMPLES), **{**QUICK, **options})
    parts = data.prepare(FROZEN, spec, EXAMPLES)
    tuned = size.tuned(FROZEN, spec, ())
    assert tuned is not None
    return memory.of_run(FROZEN, parts, tuned)


def test_memory_bounds_who_shares_a_step_and_nobody_is_passed_for_ever(store, monkeypatch):
    monkeypatch.setattr("trainer.worker.ASK_SECONDS", 0.0)
    monkeypatch.setattr("trainer.worker.ASK_SHARE", 1.0)
    for name, options in {"a": {}, "b": {"steps": 15}, "big": {"batch_size": 8}, "d": {}}.items():
        submit(store, name=name, **options)
    worker, together = watched(store, memory_bytes=2 * cost())
    assert cost(batch_size=8) > 2 * cost()
    assert worker.run_until_empty() == 4
    order = list(dict.fromkeys(frozenset(names) for names in together))
    assert order == [{"a", "b"}, {"b"}, {"big"}, {"d"}], "b's neighbour had left room for d, but big came first"


def test_in_a_full_worker_who_has_several_makes_way_for_who_has_none(store, monkeypatch):
    monkeypatch.setattr("trainer.worker.ASK_SECONDS", 0.0)
    monkeypatch.setattr("trainer.worker.ASK_SHARE", 1.0)
    submit(store, name="whole", steps=60)
    make_worker(store).run_until_empty()
    for name in ("a", "b"):
        submit(store, name=name, steps=60)
    late = at_step(20, lambda: store.jobs.submit("other", "late", EXAMPLES, QUICK))
    worker, together = watched(store, late, memory_bytes=2 * cost())
    worker.run_until_empty()
    # a is alone while who comes is made ready
    order = [names for names, _ in groupby(names for names in together if names != {"a"})]
    assert order[:3] == [{"a", "b"}, {"a", "late"}, {"a", "b"}]
    assert torch.equal(kept(store, "b"), kept(store, "whole"))
    assert store.jobs.job_counts()[JobStatus.SUCCEEDED] == 4


def turns(store: Store, also: Callable[[], object], lines: list[str]) -> list[tuple[str, int]]:
    """Who trained in turn, and for how many steps of ten seconds, in a worker that has room for one job of ours."""
    time_now = [0.0]

    def on_step() -> None:
        time_now[0] += 10.0
        also()

    options = {"memory_bytes": cost(), "clock": lambda: time_now[0], "say": lines.append}
    worker, together = watched(store, on_step, **options)
    worker.run_until_empty()
    return [(names, len(list(steps))) for names, steps in groupby(name for (name,) in together)]


def test_a_tenants_only_job_makes_way_once_it_has_had_its_turn_and_turns_alternate(store, monkeypatch):
    monkeypatch.setattr("trainer.worker.ASK_SECONDS", 0.0)
    monkeypatch.setattr("trainer.worker.ASK_SHARE", 1.0)
    submit(store, name="whole", steps=20)
    make_worker(store).run_until_empty()
    submit(store, name="first", steps=20)
    late = at_step(1, lambda: store.jobs.submit("other", "late", EXAMPLES, {**QUICK, "steps": 15}))
    found = turns(store, late, [])
    assert found == [("first", 6), ("late", 6), ("first", 6), ("late", 6), ("first", 6), ("late", 3), ("first", 2)]
    assert TURN_SECONDS == 60.0
    assert torch.equal(kept(store, "first"), kept(store, "whole"))


def several_of_mine(store: Store) -> None:
    submit(store, name="late")


def for_another_model(store: Store) -> None:
    store.jobs.submit("other", "misfit", EXAMPLES, {**QUICK, "base_digest": "0" * 64})


def of_who_trains_elsewhere(store: Store) -> None:
    """Whose job would be behind the one that made way."""
    store.jobs.submit("other", "elsewhere", EXAMPLES, QUICK)
    assert store.jobs.claim("w2", 60.0).name == "elsewhere"
    store.jobs.submit("other", "late", EXAMPLES, QUICK)


@pytest.mark.parametrize("wait", [lambda store: None, several_of_mine, for_another_model, of_who_trains_elsewhere])
def test_nobody_makes_way_for_nobody(store, monkeypatch, wait):
    monkeypatch.setattr("trainer.worker.ASK_SECONDS", 0.0)
    monkeypatch.setattr("trainer.worker.ASK_SHARE", 1.0)
    submit(store, name="first", steps=20)
    lines: list[str] = []
    found = turns(store, at_step(1, lambda: wait(store)), lines)
    assert found[0] == ("first", 20)
    assert not any("first" not in line and line.endswith("handed back") for line in lines)


def test_a_job_that_cannot_be_saved_makes_no_way_for_it_would_lose_all(store, monkeypatch):
    def refuse(*_: object) -> None:
        raise PayloadTooLarge("at most 256 MB")

    monkeypatch.setattr("trainer.worker.ASK_SECONDS", 0.0)
    monkeypatch.setattr("trainer.worker.ASK_SHARE", 1.0)
    monkeypatch.setattr(store.jobs, "save_checkpoint", refuse)
    submit(store, name="first", steps=20)
    late = at_step(1, lambda: store.jobs.submit("other", "late", EXAMPLES, QUICK))
    assert turns(store, late, []) == [("first", 20), ("late", 10)]


@pytest.mark.parametrize("share", [SHARE, 1e9])
def test_a_large_job_that_begins_keeps_nobody_waiting(store, monkeypatch, share):
    """On a clock that only steps (100 ms) and lines that are encoded (1 ms) move; with a share of all, it shows."""
    monkeypatch.setattr("trainer.worker.ASK_SECONDS", 0.0)
    monkeypatch.setattr("trainer.worker.ASK_SHARE", 1.0)
    monkeypatch.setattr("trainer.worker.SHARE", share)
    time_now, steps, encode = [0.0], [], ExampleEncoder.encode
    submit(store, name="small", steps=80)
    big = [{"prompt": f"{number} is", "completion": " a number"} for number in range(600)]

    def slowly(self: ExampleEncoder, *given: Any) -> list[Example]:
        time_now[0] += 0.001
        return encode(self, *given)

    def on_step() -> None:
        if all(run.job.name == "small" or run.tuning.step == 0 for run in worker._runs):
            steps.append(time_now[0])
        time_now[0] += 0.1
        begin()

    monkeypatch.setattr(ExampleEncoder, "encode", slowly)
    begin = at_step(3, lambda: submit(store, big, name="big", steps=20))
    worker = make_worker(store, on_step=on_step, clock=lambda: time_now[0])
    assert worker.run_until_empty() == 2
    assert store.jobs.job_counts()[JobStatus.SUCCEEDED] == 2
    gaps = [after - before for before, after in pairwise(steps)]
    assert max(gaps) <= 0.2 if share == SHARE else max(gaps) > 0.6
    assert len(steps) < 80, "and the large one had its turn"


def test_a_job_that_is_made_ready_can_be_cancelled(store, monkeypatch):
    monkeypatch.setattr("trainer.worker.SLICE_SECONDS", 0.0)
    job, encode, ends = submit(store, EXAMPLES * 50), ExampleEncoder.encode, []

    def slowly(self: ExampleEncoder, *given: Any) -> list[Example]:
        store.jobs.job(TENANT, job.id).cancel_requested or store.jobs.request_cancel(TENANT, job.id)
        encoded.append(1)
        time.sleep(0.01)
        return encode(self, *given)

    encoded: list[int] = []
    monkeypatch.setattr(ExampleEncoder, "encode", slowly)
    make_worker(store, on_end=ends.append, heartbeat_seconds=0.01).run_until_empty()
    assert (ends, now(store, job).status) == (["cancelled"], JobStatus.CANCELLED)
    assert len(encoded) < 600


def test_a_job_that_is_made_ready_goes_back_when_its_worker_stops(store, monkeypatch):
    monkeypatch.setattr("trainer.worker.SLICE_SECONDS", 0.0)
    job, encode = submit(store, EXAMPLES * 50), ExampleEncoder.encode

    def stop(self: ExampleEncoder, *given: Any) -> list[Example]:
        worker.stop()
        return encode(self, *given)

    monkeypatch.setattr(ExampleEncoder, "encode", stop)
    worker = make_worker(store)
    worker.run()
    assert (now(store, job).status, now(store, job).attempt) == (JobStatus.QUEUED, 0)


def scarce(monkeypatch, most: int) -> list[int]:
    """Memory for the rows of so many jobs at a time; how many asked for it, each time."""
    asked, losses = [], forward.losses

    def measured(frozen, groups):
        if not torch.is_grad_enabled():
            return losses(frozen, groups)
        asked.append(len(groups))
        if len(groups) > most:
            raise torch.OutOfMemoryError("no more")
        return losses(frozen, groups)

    monkeypatch.setattr(forward, "losses", measured)
    return asked


def test_jobs_that_run_out_of_memory_together_do_not_try_again(store, monkeypatch):
    monkeypatch.setattr("trainer.worker.ASK_SECONDS", 0.0)
    monkeypatch.setattr("trainer.worker.ASK_SHARE", 1.0)
    for name in "abcd":
        submit(store, name=name)
    asked = scarce(monkeypatch, 2)
    worker, together = watched(store)
    worker.run_until_empty()
    assert store.jobs.job_counts()[JobStatus.SUCCEEDED] == 4
    assert [count for count in asked if count > 2] == [4, 3], "each was tried once"
    assert {"a", "b"} in together
    assert {"c", "d"} in together


def test_jobs_that_run_out_of_memory_alone_fail_with_what_to_do(store, monkeypatch):
    jobs = [submit(store, name=name) for name in "abc"]
    asked = scarce(monkeypatch, 0)
    make_worker(store).run_until_empty()
    for job in jobs:
        error = now(store, job).error
        assert error.code == "out_of_memory"
        assert error.message.startswith("a step took more memory than there is; a smaller batch_size or max_length")
    assert asked == [3, 1, 1, 1]


def never(*_: Any) -> Any:
    raise AssertionError("nothing of it is to be made")


def test_a_job_that_keeps_more_than_there_is_fails_before_it_takes_it(store):
    jobs = [submit(store, method=name, bottleneck=8192) for name in ("prefix_mlp", "prompt_lstm")]
    methods = {"prefix_mlp": never, "prompt_lstm": never}
    make_worker(store, methods=methods, memory_bytes=20 << 20).run_until_empty()
    for job in jobs:
        error = now(store, job).error
        assert error.code == "out_of_memory"
        assert re.fullmatch(
            r"method \w+ tunes [\d,]+ numbers here, which with their gradient and optimiser take [\d,]+ MB, and this "
            r"worker has 20 MB for training; "
            r"a smaller bottleneck or a smaller virtual_tokens or another method takes less",
            error.message,
        )


def test_so_does_one_of_a_method_whose_size_only_shows_when_it_is_made(store):
    options = {**QUICK, "method": "plugged", "bottleneck": 8192}
    job = store.jobs.submit(TENANT, NAME, EXAMPLES, options, methods=["plugged"])
    make_worker(store, methods={"plugged": METHODS["prefix_mlp"]}, memory_bytes=20 << 20).run_until_empty()
    assert now(store, job).error.code == "out_of_memory"


def test_one_that_fails_is_alone_in_it(store):
    """Diverged, cancelled, paused, taken away, impossible: each beside a job that must not notice."""
    submit(store, name="alone")
    make_worker(store).run_until_empty()
    jobs = {name: submit(store, name=name) for name in ("good", "nan", "cancelled", "paused", "taken")}
    jobs["misfit"] = submit(store, name="misfit", stacks=["encoder"])

    def strike() -> None:
        run = {run.job.name: run for run in worker._runs}
        run["nan"].tuning.method.parameters()[0].data[:] = float("nan")
        store.jobs.request_cancel(TENANT, jobs["cancelled"].id)
        store.jobs.request_pause(TENANT, jobs["paused"].id)
        store.jobs.finish(run["taken"].job, JobStatus.PAUSED, None)

    ends: list[str] = []
    steps = at_step(13, strike)
    worker, _ = watched(store, lambda: (steps(), time.sleep(0.02)), on_end=ends.append, heartbeat_seconds=0.01)
    worker.run_until_empty()
    found = {name: now(store, job) for name, job in jobs.items()}
    assert {name: job.status.value for name, job in found.items()} == {
        "good": "succeeded", "nan": "failed", "cancelled": "cancelled", "paused": "paused", "taken": "paused",
        "misfit": "failed",
    }  # fmt: skip
    assert (found["nan"].error.code, found["misfit"].error.code) == ("training_diverged", "invalid_request")
    assert sorted(ends) == ["cancelled", "failed", "failed", "lost", "paused", "succeeded"]
    torch.testing.assert_close(kept(store, "good"), kept(store, "alone"), atol=1e-5, rtol=0)


def test_what_was_with_a_dead_worker_is_tried_alone_until_it_gets_on(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.worker.ASK_SECONDS", 0.0)
    monkeypatch.setattr("trainer.worker.ASK_SHARE", 1.0)
    time_now = [1000.0]
    store = Store.open(f"sqlite:///{tmp_path}/store.db", clock=lambda: time_now[0])
    suspect = submit(store, name="suspect")
    store.jobs.claim("dead", 60.0)
    time_now[0] += 61.0
    submit(store, name="other")
    worker, together = watched(store, checkpoint_seconds=0.0)
    assert worker.run_until_empty() == 2
    assert together[0] == {"suspect"}
    assert {"suspect", "other"} in together
    assert (now(store, suspect).lapses, now(store, suspect).status) == (0, JobStatus.SUCCEEDED)
    store.close()


def test_a_prefix_no_better_than_none_is_published_only_if_asked(store):
    """A start that harms, at a rate that changes nothing."""
    harmless = {"learning_rate": 1e-7, "steps": 2, "init_text": "is is"}
    refused = submit(store, **harmless)
    asked = submit(store, name="asked", publish_anyway=True, **harmless)
    make_worker(store).run_until_empty()
    after, bare = re.fullmatch(r"keeping .*, (\S+) after, (\S+) without a prefix", said(store, asked)[-1]).groups()
    assert float(after) > float(bare), "else this shows nothing"
    failed = now(store, refused)
    assert (failed.status, failed.error.code, versions(store)) == (JobStatus.FAILED, "no_improvement", 0)
    told = re.search(r"loss is (\S+) with the prefix, .* and (\S+) with none", failed.error.message).groups()
    assert [round(float(loss), 3) for loss in told] == pytest.approx([float(after), float(bare)], abs=2e-3)
    assert (now(store, asked).status, versions(store, "asked")) == (JobStatus.SUCCEEDED, 1)


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
    assert now(store, job).checkpoint is not None, "whoever takes it up goes on where it stood"
    assert "antefix_worker_steps_total" in text
    assert "trains tiny (" in output.splitlines()[0]
    assert output.splitlines()[-1] == "antefix worker: stopped"
