import threading
import time
from pathlib import Path

import pytest
import typer

from prefix_store.cli import train
from prefix_store.jobs import JobError, JobStatus, TrainingJob
from tests.models import random_kv
from tests.prefix_store.cli.conftest import Antefix, Running
from tests.server import artefacts

GOOD = '{"prompt": "2+2=", "completion": "4"}\n'


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text(GOOD + "\n" + GOOD)
    return path


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "POLL_SECONDS", 0.02)


def work(running: Running, status: JobStatus) -> threading.Thread:
    """A worker that takes the next job, makes a step and ends it."""

    def run() -> None:
        job = None
        while job is None:
            time.sleep(0.01)
            job = running.store.jobs.claim("worker", 60)
        running.store.jobs.heartbeat(job, 60, {"step": 1, "train_loss": 2.5, "seconds_left": 61.2})
        time.sleep(0.1)
        end(running, job, status)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def end(running: Running, job: TrainingJob, status: JobStatus) -> None:
    if status is JobStatus.SUCCEEDED:
        manifest = artefacts.manifest(running.frozen)
        running.store.prefixes.save("default", job.name, manifest, {"self.kv": random_kv(running.frozen, 4)}, job=job)
    else:
        running.store.jobs.finish(job, status, JobError("diverged", "the loss is no number"))


def test_it_follows_the_job_to_its_end(antefix: Antefix, running: Running, data: Path) -> None:
    worker = work(running, JobStatus.SUCCEEDED)
    result = antefix("train", "--name", "sums", "--data", data, "--steps", "5", "--virtual-tokens", "4")
    worker.join()
    assert result.exit_code == 0, result.stderr
    assert "sums@1 is served; try: antefix generate --prefix sums" in result.stdout


def test_a_failed_job_is_a_failed_command(antefix: Antefix, running: Running, data: Path) -> None:
    worker = work(running, JobStatus.FAILED)
    result = antefix("train", "--name", "fails", "--data", data)
    worker.join()
    assert (result.exit_code, result.stderr) == (1, "antefix: the job failed: the loss is no number\n")


def test_ctrl_c_leaves_the_job_and_says_how_to_cancel(
    antefix: Antefix, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train.time, "sleep", interrupt)
    result = antefix("train", "--name", "left", "--data", data)
    job_id = result.stdout.split()[0]
    assert result.exit_code == 130
    assert f"antefix jobs cancel {job_id}" in result.stderr
    assert f"{job_id}\tleft\tqueued" in antefix("jobs").stdout
    antefix("jobs", "cancel", job_id)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: expected an object"),
        ('{"prompt": "a"}', "line 2: expected an object"),
        ('{"prompt": "a", "completion": 3}', "line 2: prompt and completion must be strings"),
        ('{"prompt": "a", "completion": ""}', "line 2: the completion is empty"),
        ("[" * 100_000, "line 2: not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d").write_text(GOOD + line)
    with pytest.raises(typer.Exit):
        train.read_examples(tmp_path / "d")
    assert said in capsys.readouterr().err


def test_blank_lines_are_passed_over_and_no_line_is_an_error(data: Path, tmp_path: Path) -> None:
    assert len(train.read_examples(data)) == 2
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(typer.Exit):
        train.read_examples(tmp_path / "empty")


def test_numbers_shows_what_is_known() -> None:
    job = {"status": "running", "options": {"steps": 5}, "progress": {"step": 1, "train_loss": 2.5, "seconds_left": 61}}
    assert train.numbers(job) == "step 1/5  loss 2.500  1:01 left"
    assert train.numbers(job | {"progress": {}}) == ""
    assert "antefix worker" in train.numbers(job | {"progress": {}, "status": "queued"})
