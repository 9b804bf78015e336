import csv
import dataclasses
import io

import pytest

from prefix_store.jobs import JobEvent, JobStatus, TrainingJob, TrainingSpec
from prefix_store.model.frozen import FrozenModel
from server.api import openai_views

JOB = TrainingJob("ftjob-Ab1", "acme", "support", TrainingSpec("0" * 64, 3), JobStatus.QUEUED, created_at=5.9)


def test_results_are_csv_that_reads_back_in_order_with_nothing_for_what_was_not_measured() -> None:
    curve = [
        {"step": 1, "train_loss": 0.1, "valid_loss": None, "learning_rate": 1e-9, "tokens_per_second": 3.0},
        {"step": 2, "train_loss": 2.0, "valid_loss": 0.5, "learning_rate": 0.0, "tokens_per_second": 4.5},
    ]
    rows = list(csv.DictReader(io.StringIO(openai_views.results(curve).decode())))
    assert [{name: float(text) if text else None for name, text in row.items()} for row in rows] == curve
    assert openai_views.results([]) == b"step,train_loss,valid_loss,learning_rate,tokens_per_second\n"


def test_an_events_id_names_its_line_of_its_job_alone() -> None:
    event = JobEvent(JOB.id, 12, 1.0, "message", {"message": "x"})
    name = openai_views.event(event)["id"]
    assert openai_views.sequence_of(name, JOB) == 12
    other = dataclasses.replace(JOB, id="ftjob-Ab")
    assert openai_views.sequence_of(name, other) is None
    for odd in ("", "12", name + "x", name.replace("12", "012"), name.replace("12", "٣"), name + "0" * 9):
        assert openai_views.sequence_of(odd, JOB) is None


def test_a_job_for_another_base_model_does_not_bear_this_ones_name(frozen: FrozenModel) -> None:
    def model(**spec: object) -> str:
        return str(openai_views.job(dataclasses.replace(JOB, spec=TrainingSpec("0" * 64, 3, **spec)), frozen)["model"])

    assert model() == model(base_digest=frozen.digest) == frozen.name
    assert model(base_digest="f" * 64) == "f" * 64
    assert model(base_digest=frozen.digest, init_from="acme/a@1") == "acme/a@1"


@pytest.mark.parametrize("multiplier", [1.7, 0.3, 1e-5, 33.333333, 2])
@pytest.mark.parametrize("method", ["prefix", "prompt", "prompt_lstm", "prefix_plus", "own"])
def test_a_multiplier_is_shown_as_it_was_asked_for(frozen: FrozenModel, method: str, multiplier: float) -> None:
    rate = openai_views.default_rate(method) * multiplier
    plus = {"virtual_tokens": 0} if method == "prefix_plus" else {}
    spec = TrainingSpec("0" * 64, 3, method, learning_rate=rate, **plus)
    shown = openai_views.job(dataclasses.replace(JOB, spec=spec), frozen)
    assert shown["hyperparameters"]["learning_rate_multiplier"] == multiplier


@pytest.mark.parametrize(
    ("status", "started_at", "has"),
    [("queued", None, False), ("running", 1.0, False), ("cancelled", None, False), ("cancelled", 1.0, True)],
)
def test_what_has_begun_and_ended_has_results(status: str, started_at: float | None, has: bool) -> None:
    job = dataclasses.replace(JOB, status=JobStatus(status), started_at=started_at)
    assert openai_views.has_results(job) is has
