"""A run made wholly with OpenAI's own client, from the file to the answer, with a real server and a real worker."""

from __future__ import annotations

import csv
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from prefix_store.store import Store
from server.app import create_app
from server.engine.engine import Engine
from server.engine.prefix_loader import PrefixLoader
from server.scheduler.scheduler import Limits
from tests.models import tiny_frozen
from tests.server import loops
from tests.server.over_http import serving
from trainer.worker import Worker

openai = pytest.importorskip("openai")

LIMITS = Limits(slots=4096, rows=16, step_tokens=64, context_length=512, waiting=64)
CHAT = "{% for message in messages %}[{{ message.role }}] {{ message.content }}{% endfor %}[assistant]"
COMPLETIONS = [{"prompt": f"{number} is", "completion": " a number"} for number in range(24)]
MESSAGES = [
    {"messages": [{"role": "user", "content": str(number)}, {"role": "assistant", "content": " a number"}]}
    for number in range(12)
]
PATIENCE = 120.0


@contextmanager
def working(url: str) -> Iterator[None]:
    """A worker beside the server, as another process would be."""
    store = Store.open(url)
    worker = Worker(store, tiny_frozen("llama"), "w", say=lambda line: None)
    thread = threading.Thread(target=worker.run, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        worker.stop()
        thread.join(PATIENCE)
        store.close()


@pytest.fixture
def where(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/store.db"


@pytest.fixture
def client(where: str) -> Iterator[Any]:
    store = Store.open(where)
    frozen = tiny_frozen("llama")
    loop = loops.running(Engine(frozen, LIMITS))
    app = create_app(store, frozen, loop, PrefixLoader(store.prefixes, frozen, 1 << 24), chat_template=CHAT)
    with serving(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def jsonl(examples: list[dict[str, Any]]) -> tuple[str, bytes]:
    return "examples.jsonl", "".join(json.dumps(example) + "\n" for example in examples).encode()


def ended(client: Any, job_id: str) -> Any:
    deadline = time.monotonic() + PATIENCE
    while (job := client.fine_tuning.jobs.retrieve(job_id)).status in ("queued", "running"):
        assert time.monotonic() < deadline, job
        time.sleep(0.05)
    return job


def test_from_a_file_to_the_answer_of_the_fine_tuned_model(client: Any, where: str) -> None:
    file = client.files.create(file=jsonl(COMPLETIONS), purpose="fine-tune")
    assert (file.object, file.filename, file.status) == ("file", "examples.jsonl", "processed")
    job = client.fine_tuning.jobs.create(
        model="tiny-llama",
        training_file=file.id,
        suffix="numbers",
        seed=3,
        metadata={"team": "sums"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 60, "batch_size": 4}}},
        extra_body={"antefix": {"virtual_tokens": 8, "learning_rate": 0.3}},
    )
    assert (job.status, job.fine_tuned_model, job.hyperparameters.n_epochs) == ("queued", None, 60)
    with working(where):
        job = ended(client, job.id)
    assert (job.status, job.error, job.fine_tuned_model) == ("succeeded", None, "numbers@1"), job.error
    steps = 60 * 22 // 4  # a tenth is held back
    shown = [len(f"_{number} is a number_") for number in range(24)]
    assert steps * 4 * min(shown) <= job.trained_tokens <= steps * 4 * max(shown)

    events = list(client.fine_tuning.jobs.list_events(job.id, limit=7))  # more pages than one
    assert len({event.id for event in events}) == len(events) > 20
    metrics = [event for event in events if event.type == "metrics"]
    assert [event.data["step"] for event in metrics] == sorted((e.data["step"] for e in metrics), reverse=True)
    assert metrics[0].data["step"] == steps
    assert metrics[0].data["trained_tokens"] == job.trained_tokens
    assert metrics[0].data["valid_loss"] < metrics[-1].data["train_loss"]
    assert {event.type for event in events} == {"message", "metrics"}

    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert (checkpoint.fine_tuned_model_checkpoint, checkpoint.fine_tuning_job_id) == (job.fine_tuned_model, job.id)
    lowest = min(metrics, key=lambda event: event.data["valid_loss"] or 1e9)
    assert (checkpoint.step_number, checkpoint.metrics.valid_loss) == (lowest.data["step"], lowest.data["valid_loss"])

    types = openai.types.fine_tuning  # the client itself takes any shape
    for kind, found in {types.FineTuningJob: [job], types.FineTuningJobEvent: events}.items():
        assert all(kind.model_validate(one.to_dict(), strict=True) for one in found)
    types.jobs.FineTuningJobCheckpoint.model_validate(checkpoint.to_dict(), strict=True)
    openai.types.FileObject.model_validate(file.to_dict(), strict=True)
    assert set(types.FineTuningJob.model_fields) == set(job.to_dict()) - {"antefix"}
    assert set(openai.types.FileObject.model_fields) == set(file.to_dict())

    (results,) = job.result_files
    rows = list(csv.DictReader(io.StringIO(client.files.content(results).text)))
    assert [int(row["step"]) for row in rows] == [event.data["step"] for event in reversed(metrics)]
    assert client.files.retrieve(results).purpose == "fine-tune-results"

    asked = {"prompt": "7 is", "max_tokens": 10, "temperature": 0}
    tuned, bare = (client.completions.create(model=m, **asked) for m in (job.fine_tuned_model, "tiny-llama"))
    assert (tuned.choices[0].text, tuned.choices[0].finish_reason) == (" a number", "stop")
    assert bare.choices[0].text != tuned.choices[0].text
    assert client.models.retrieve(job.fine_tuned_model).id == job.fine_tuned_model
    assert [model.id for model in client.models.list()] == ["tiny-llama", "numbers"]


def test_messages_and_a_file_to_validate_on(client: Any, where: str) -> None:
    train, judges = (client.files.create(file=jsonl(part), purpose="fine-tune") for part in (MESSAGES, MESSAGES[:3]))
    job = client.fine_tuning.jobs.create(
        model="tiny-llama",
        training_file=train.id,
        validation_file=judges.id,
        hyperparameters={"n_epochs": 5, "batch_size": 4, "learning_rate_multiplier": 2.5},
        extra_body={"antefix": {"virtual_tokens": 3}},
    )
    assert (job.training_file, job.validation_file) == (train.id, judges.id)
    for file in (train, judges):
        assert client.files.delete(file.id).deleted  # the job has what it needs
    with working(where):
        job = ended(client, job.id)
    assert job.status == "succeeded", job.error
    said = [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
    assert any("training on 12 examples" in message and "validating on 3" in message for message in said)
    again = client.fine_tuning.jobs.create(
        model=job.fine_tuned_model,
        training_file=client.files.create(file=jsonl(MESSAGES), purpose="fine-tune").id,
        extra_body={"antefix": {"steps": 2, "publish_anyway": True}},
    )
    with working(where):
        again = ended(client, again.id)
    assert (again.status, again.model) == ("succeeded", f"default/{job.fine_tuned_model}"), again.error
    reply = client.chat.completions.create(
        model=again.fine_tuned_model, messages=[{"role": "user", "content": "7"}], max_tokens=4
    )
    assert reply.choices[0].message.role == "assistant"


def test_paused_resumed_cancelled_listed_and_refused(client: Any) -> None:
    files = [client.files.create(file=jsonl(COMPLETIONS), purpose="fine-tune") for _ in range(3)]
    assert sorted(file.id for file in client.files.list(limit=2)) == sorted(file.id for file in files)
    assert client.files.content(files[0].id).read() == jsonl(COMPLETIONS)[1]
    asked = {"model": "tiny-llama", "training_file": files[0].id}
    jobs = [client.fine_tuning.jobs.create(**asked, metadata={"n": str(n)}) for n in range(3)]
    found = list(client.fine_tuning.jobs.list(limit=2))
    assert [job.id for job in found] == [job.id for job in reversed(jobs)]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"n": "1"})] == [jobs[1].id]
    verbs = client.fine_tuning.jobs
    states = [verb(jobs[0].id).status for verb in (verbs.pause, verbs.resume, verbs.cancel)]
    assert states == ["paused", "queued", "cancelled"]
    with pytest.raises(openai.ConflictError):
        verbs.cancel(jobs[0].id)
    with pytest.raises(openai.BadRequestError) as bad:
        client.files.create(file=("x.jsonl", b'{"text": "a"}\n{"text": 3}\n'), purpose="fine-tune")
    assert (bad.value.code, "line 2" in str(bad.value)) == ("invalid_training_file", True)
    with pytest.raises(openai.NotFoundError) as missing:
        verbs.create(model="tiny-llama", training_file="file-none")
    assert (missing.value.code, missing.value.param) == ("file_not_found", "training_file")
    with pytest.raises(openai.NotFoundError) as model:
        verbs.create(model="gpt-4o-mini", training_file=files[0].id)
    assert model.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as typo:
        verbs.create(**asked, extra_body={"antefix": {"virtual_token": 3}})
    assert "did you mean 'virtual_tokens'" in str(typo.value)
