import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer

from prefix_store.cli import train, watch
from prefix_store.cli.client import Client
from prefix_store.examples import EXPECTED
from prefix_store.job_store import OPTIONS
from prefix_store.jobs import JobError, JobStatus, TrainingJob
from tests.models import random_kv
from tests.prefix_store.cli.conftest import HOSTILE, SPELT, Antefix, Instead, Running
from tests.server import artefacts

GOOD = '{"prompt": "2+2=", "completion": "4"}\n'


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text(GOOD + "\n" + GOOD)
    return path


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.02)


def work(running: Running, status: JobStatus) -> threading.Thread:
    """A worker that takes the next job, makes a step and ends it."""

    def run() -> None:
        job = None
        while job is None:
            time.sleep(0.01)
            job = running.store.jobs.claim("worker", 60)
        running.store.jobs.heartbeat(job, 60, {"step": 1, "train_loss": 2.5, "seconds_left": 61.2})
        running.store.jobs.add_event(
            job, "message", {"message": "keeping step 5: validation loss 3.000 before, 2.000 after"}
        )
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
    assert re.fullmatch(r"ftjob-\w+\ntrained in 0:0\d\nsums@1 is served; try: antefix generate .*\n", result.stdout)
    assert "keeping step 5: validation loss 3.000 before, 2.000 after\n" in result.stderr


def test_a_failed_job_is_a_failed_command(antefix: Antefix, running: Running, data: Path) -> None:
    worker = work(running, JobStatus.FAILED)
    result = antefix("train", "--name", "fails", "--data", data)
    worker.join()
    assert result.exit_code == 1
    assert result.stderr.endswith("\nantefix: the job failed: the loss is no number\n")


def test_ctrl_c_leaves_the_job_and_says_how_to_cancel(
    antefix: Antefix, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupt)
    result = antefix("train", "--name", "left", "--data", data)
    job_id = result.stdout.split()[0]
    assert result.exit_code == 130
    assert f"antefix jobs cancel {job_id}" in result.stderr
    assert f"{job_id}\tleft\tqueued" in antefix("jobs").stdout
    antefix("jobs", "cancel", job_id)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: not JSON (Expecting property name enclosed in double quotes at column 2)"),
        ("[1]", f"line 2: expected an object {EXPECTED}, got a list"),
        ('{"messages": []}', "line 2: no message of an assistant to learn from"),
        ('{"prompt": "a"}', "got an object with 'prompt'"),
        ("{}", "got an object with nothing"),
        ('{"prompt": "a", "completion": 3}', "line 2: completion must be a text, got a number"),
        ('{"prompt": null, "completion": "a"}', "got an object with 'completion', and null as 'prompt'"),
        ('{"text": "a", "text": "b"}', "line 2: 'text' is given more than once"),
        ('{"prompt": "a", "completion": ""}', "line 2: completion is empty"),
        ('{"prompt": "a", "completion": "\\ud800"}', "line 2: completion is not valid Unicode"),
        ("[" * 100_000, "line 2: not JSON"),
        ("1" * 10_000, "line 2: not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d").write_text(GOOD + line)
    with pytest.raises(typer.Exit):
        train.read_examples(tmp_path / "d")
    assert said in capsys.readouterr().err


def test_the_first_bad_lines_are_named_and_no_more_than_five(antefix: Antefix, tmp_path: Path) -> None:
    (tmp_path / "d").write_text("{}\n" + GOOD + "{}\n" * 9)
    result = antefix("train", "--name", "sums", "--data", tmp_path / "d")
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.findall(r"d, line (\d+): ", result.stderr) == ["1", "3", "4", "5", "6"]


def test_help_tells_every_default(antefix: Antefix) -> None:
    shown = " ".join(antefix("train", "--help").stdout.replace("│", "").split())
    assert (shown.count("Default:"), shown.count("Default: chosen by the data.")) == (19, 4)


def test_blank_lines_are_passed_over_and_no_line_is_an_error(data: Path, tmp_path: Path) -> None:
    assert len(train.read_examples(data)) == 2
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(typer.Exit):
        train.read_examples(tmp_path / "empty")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d").write_bytes(b"\xff\xfe{")
    with pytest.raises(typer.Exit):
        train.read_examples(tmp_path / "d")
    assert "line 1: not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["No Name", "", "..", "a/b"])
def test_a_name_against_the_rules_is_refused(antefix: Antefix, data: Path, name: str) -> None:
    result = antefix("train", "--name", name, "--data", data)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"beginning with a letter or digit; got {name!r}" in result.stderr


def test_only_what_is_given_is_sent(antefix: Antefix, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []

    def post(client: Client, path: str, json: dict[str, Any]) -> dict[str, Any]:
        sent.append((path, json))
        return {"job": {"id": "ftjob-x"}}

    monkeypatch.setattr(Client, "post", post)
    example = {"prompt": "2+2=", "completion": "4"}
    antefix("train", "--no-wait", "--name", "sums", "--data", data)
    assert sent.pop() == ("/v1/prefixes/sums/train", {"examples": [example, example]})
    antefix("train", "--no-wait", "--name", "sums", "--data", data, "--method", "prompt", "--steps", "5")
    assert sent.pop()[1] == {"examples": [example, example], "method": "prompt", "steps": 5}
    antefix("train", "--no-wait", "--name", "sums", "--data", data, "--validation", data, "--max-length", "50")
    assert sent.pop()[1] == {
        "examples": [example, example], "validation_examples": [example, example], "max_length": 50
    }  # fmt: skip


def test_all_shapes_are_sent(antefix: Antefix, running: Running, tmp_path: Path) -> None:
    lines = [{"text": "a"}, {"prompt": "a", "completion": "b"}]
    (tmp_path / "d").write_text("\n".join(json.dumps(line) for line in lines))
    job_id = antefix("train", "--no-wait", "--name", "mixed", "--data", tmp_path / "d").stdout.strip()
    job = running.store.jobs.job("default", job_id)
    assert job is not None
    assert running.store.jobs.examples(job) == lines
    antefix("jobs", "cancel", job_id)


def test_every_option_of_a_job_can_be_given(
    antefix: Antefix, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(Client, "post", lambda client, path, json: sent.append(json) or {"job": {"id": "ftjob-x"}})
    (tmp_path / "context").write_text("\ufeffA long text.", encoding="utf-8")
    options: dict[str, Any] = {
        **{
            "method": "prefix_mlp",
            "virtual_tokens": 4,
            "steps": 5,
            "epochs": 2,
            "learning_rate": 0.2,
            "batch_size": 3,
            "seed": 7,
        },
        **{"schedule": "cosine", "warmup": 0.1, "weight_decay": 0.5, "max_length": 64, "template": "{prompt}:"},
        **{"init": "random_tokens", "init_text": "a", "init_from": "b@1", "frozen_tokens": 2, "bottleneck": 8},
        **{"feature_map": "gelu", "patience": 3},
    }
    flags, stacks = ["--publish-anyway"], ["--stacks", "encoder, self"]
    given = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    result = antefix(
        "train", "--no-wait", "--name", "x", "--data", data, "--context", tmp_path / "context", *given, *flags, *stacks
    )
    assert result.exit_code == 0, result.stderr
    body = sent.pop()
    del body["examples"]
    chosen = {"objective": "distil", "context": "A long text.", "publish_anyway": True, "stacks": ["encoder", "self"]}
    assert body == options | chosen
    assert set(body) == OPTIONS - {"base_digest", "chat_template"}


def test_a_context_that_is_no_text_is_refused(antefix: Antefix, data: Path, tmp_path: Path) -> None:
    (tmp_path / "context").write_bytes(b"\xff")
    result = antefix("train", "--no-wait", "--name", "x", "--data", data, "--context", tmp_path / "context")
    assert result.exit_code == 1
    assert "context: not UTF-8" in result.stderr


def test_a_method_that_nobody_knows_is_refused_by_the_server(antefix: Antefix, data: Path) -> None:
    result = antefix("train", "--no-wait", "--name", "sums", "--data", data, "--method", "magic")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "method" in result.stderr


JOB: dict[str, Any] = {
    "id": "ftjob-x",
    "prefix_id": "sums",
    "status": "running",
    "version": None,
    "attempt": 1,
    "cancel_requested": False,
    "progress": {},
    "error": None,
    "options": {"steps": 40, "method": "prefix", "init_text": None},
}
ENDED = {"status": "succeeded", "version": 1, "started_at": 1, "finished_at": 2}


def one_job(begun: dict[str, Any], ended: dict[str, Any], said: str) -> Callable[[httpx.Request], httpx.Response]:
    """A server whose only job is, asked for once more, at its end."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            return httpx.Response(200, json={"job": begun})
        event = {"sequence": 1, "type": "message", "data": {"message": said}}
        listed = {"/v1/jobs": [begun, ended], "/v1/jobs/ftjob-x/events": [event]}.get(request.url.path)
        after = request.url.params.get("after")
        found = ended if listed is None else {"data": [] if after == "1" else listed, "has_more": False}
        return httpx.Response(200, json=found)

    return answer


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize(
    ("begun", "ended", "said"),
    [
        ({"id": HOSTILE}, ENDED, ""),
        ({}, ENDED | {"prefix_id": HOSTILE}, ""),
        ({}, ENDED | {"version": HOSTILE}, ""),
        ({"status": HOSTILE}, ENDED, ""),
        ({}, {"status": "failed", "error": {"code": HOSTILE, "message": HOSTILE}}, ""),
        ({}, ENDED, HOSTILE),
    ],
)
def test_no_field_of_a_job_moves_the_cursor(
    antefix: Antefix,
    instead: Instead,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    begun: dict[str, Any],
    ended: dict[str, Any],
    said: str,
    live: bool,
) -> None:
    seen = []
    numbers = watch.numbers
    monkeypatch.setattr(watch, "numbers", lambda *job: seen.append(numbers(*job)) or seen[-1])
    monkeypatch.setattr(watch, "is_live", lambda stream: live)
    instead(one_job(JOB | begun, JOB | ended, said))
    result = antefix("train", "--name", "sums", "--data", data)
    listed = antefix("jobs")
    assert not isinstance(result.exception, Exception), result.exception
    output = "".join([*seen, result.output])  # seen: what a bar shows before its end is on no output that a test has
    assert SPELT in output or SPELT in listed.output
    assert not set("\x1b\u200f") & set(output + listed.output)
    assert listed.exit_code == 0


def test_a_step_s_figures_move_no_cursor() -> None:
    progress = {"step": HOSTILE}
    assert watch.numbers(JOB | {"options": {"steps": HOSTILE}}, progress) == f"step {SPELT}/{SPELT}"


def test_a_job_that_rests_is_not_waited_for(antefix: Antefix, instead: Instead, data: Path) -> None:
    instead(one_job(JOB, JOB | {"status": "paused"}, ""))
    result = antefix("train", "--name", "sums", "--data", data)
    assert result.exit_code == 1
    assert f"the job was paused; to go on: antefix jobs resume {JOB['id']}" in result.stderr
