import json
from pathlib import Path

import pytest

from prefix_store.cli import jobs
from tests.prefix_store.cli.conftest import Antefix, Running


def queue(antefix: Antefix, folder: Path) -> str:
    (folder / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    return antefix("train", "--name", "sums", "--data", folder / "data.jsonl", "--no-wait").stdout.strip()


def test_list_show_and_cancel(antefix: Antefix, tmp_path: Path) -> None:
    job_id = queue(antefix, tmp_path)
    assert f"{job_id}\tsums\tqueued" in antefix("jobs").stdout
    for arguments in (["jobs", job_id], ["jobs", "show", job_id]):
        assert json.loads(antefix(*arguments).stdout)["id"] == job_id
    assert antefix("jobs", "cancel", job_id).stdout == f"{job_id}\tsums\tcancelled\n"
    again = antefix("jobs", "cancel", job_id)
    assert again.exit_code == 1


def test_pause_and_resume(antefix: Antefix, tmp_path: Path) -> None:
    job_id = queue(antefix, tmp_path)
    assert antefix("jobs", "pause", job_id).stdout == f"{job_id}\tsums\tpaused\n"
    assert antefix("jobs", "resume", job_id).stdout == f"{job_id}\tsums\tqueued\n"
    again = antefix("jobs", "resume", job_id)
    assert (again.exit_code, again.stderr) == (1, f"antefix: job {job_id} is queued, not paused\n")
    antefix("jobs", "cancel", job_id)


def test_an_unknown_job_is_an_error(antefix: Antefix) -> None:
    result = antefix("jobs", "ftjob-none")
    assert (result.exit_code, result.stderr) == (1, "antefix: there is no job 'ftjob-none'\n")


@pytest.mark.parametrize("job_id", ["ls", "", "../prefixes"])
def test_what_can_be_no_id_does_not_lead_elsewhere(antefix: Antefix, job_id: str) -> None:
    for arguments in (["jobs", verb, job_id] for verb in ("show", "cancel", "pause", "resume")):
        result = antefix(*arguments)
        assert (result.exit_code, result.stdout) == (1, "")
        assert f"a job's id begins with ftjob-, got {job_id!r}; `antefix jobs` lists them" in result.stderr


def test_a_running_job_shows_its_step(antefix: Antefix, running: Running, tmp_path: Path) -> None:
    job_id = queue(antefix, tmp_path)
    claimed = running.store.jobs.claim("worker", 60)
    assert claimed is not None
    assert claimed.id == job_id
    running.store.jobs.heartbeat(claimed, 60, {"step": 3, "total_steps": 200})
    assert f"{job_id}\tsums\trunning\tstep 3 of 200\n" in antefix("jobs").stdout
    told = {
        "train_loss": 2.5,
        "valid_loss": 2.25,
        "learning_rate": 0.06,
        "tokens_per_second": 1234.5,
        "total_steps": 200,
    }
    running.store.jobs.heartbeat(claimed, 60, {"step": 3, **told, "seconds_left": 61.2})
    figures = "loss 2.500\tvalidation 2.250\trate 0.06\t1,234 tokens/s\t1:01 left"
    assert f"{job_id}\tsums\trunning\tstep 3 of 200\t{figures}\n" in antefix("jobs").stdout
    assert antefix("jobs", "pause", job_id).stdout.endswith("\tpausing\n")
    assert antefix("jobs", "cancel", job_id).stdout.endswith("\tcancelling\n")


def test_a_job_whose_worker_is_not_heard_of_says_so(antefix: Antefix, running: Running, tmp_path: Path) -> None:
    job_id = queue(antefix, tmp_path)
    while (claimed := running.store.jobs.claim("worker", 60)) is not None and claimed.id != job_id:
        pass
    job = json.loads(antefix("jobs", job_id).stdout)
    assert jobs.line(job) == f"{job_id}\tsums\trunning"
    assert jobs.line(job | {"silent_seconds": 31}) == f"{job_id}\tsums\trunning\tno sign of life for 31 s"


def test_a_report_is_shown_and_drawn(antefix: Antefix, running: Running, tmp_path: Path) -> None:
    job_id = queue(antefix, tmp_path)
    claimed = None
    while claimed is None or claimed.id != job_id:
        claimed = running.store.jobs.claim("worker", 60)
        assert claimed is not None
    point = {"step": 1, "train_loss": 2.0, "valid_loss": 1.5, "learning_rate": 0.1}
    running.store.jobs.add_event(claimed, "metrics", point)
    result = antefix("jobs", "report", job_id, "--png", tmp_path / "a.png")
    assert json.loads(result.stdout)["best"]["valid_loss"] == 1.5
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert antefix("jobs", "report", "ftjob-none").exit_code == 1
    antefix("jobs", "cancel", job_id)
