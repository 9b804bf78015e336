from typing import Any

import pytest

from prefix_store.cli import watch
from prefix_store.cli.watch import History

JOB: dict[str, Any] = {"id": "ftjob-x", "status": "running", "attempt": 1, "options": {"steps": 40}, "progress": {}}


class Server:
    """Its job, and its events from a sequence number on."""

    def __init__(self, *jobs: dict[str, Any]) -> None:
        self.jobs = list(jobs)
        self.events: list[dict[str, Any]] = []

    def get(self, path: str) -> dict[str, Any]:
        return self.jobs.pop(0)

    def pages(self, path: str, key: str, after: int) -> list[dict[str, Any]]:
        return [event for event in self.events if event["sequence"] > after]

    def add(self, kind: str, **data: Any) -> None:
        self.events.append({"sequence": len(self.events) + 1, "type": kind, "data": data})


def beat(step: int, **changes: Any) -> dict[str, Any]:
    return {**JOB, "progress": {"step": step}, **changes}


def test_numbers_shows_what_is_known() -> None:
    progress = {"step": 1, "train_loss": 2.5, "tokens_per_second": 1234.5, "seconds_left": 61.2}
    assert watch.numbers(JOB, progress) == "step 1/40  loss 2.500  1,234 tokens/s  1:01 left"
    assert "  loss 2.500  validation 2.250  1" in watch.numbers(JOB, progress | {"valid_loss": 2.25})
    assert watch.numbers(JOB, {}) == "running"
    assert "antefix worker" in watch.numbers(JOB | {"status": "queued"}, {})
    assert watch.numbers(JOB | {"silent_seconds": 9}, {"step": 1}) == "step 1/40", "two heartbeats may be late"
    assert watch.numbers(JOB | {"silent_seconds": 31}, {"step": 1}) == "step 1/40  no sign of life for 31 s"
    assert watch.numbers(JOB | {"silent_seconds": 31}, {}) == "running  no sign of life for 31 s"


def test_the_last_validation_is_kept_and_what_was_said_is_said_once() -> None:
    server, history = Server(), History(JOB)
    server.add("message", message="training on 3 examples")
    server.add("metrics", step=10, train_loss=2.0, valid_loss=2.5)
    server.add("metrics", step=11, train_loss=1.9, valid_loss=None)
    assert history.read(server, JOB) == ["training on 3 examples"]
    assert history.progress == {"step": 11, "train_loss": 1.9, "valid_loss": 2.5}
    assert history.read(server, JOB) == []


def test_the_later_of_heartbeat_and_event_counts() -> None:
    server, history = Server(), History(JOB)
    server.add("metrics", step=8)
    history.read(server, beat(9))
    history.read(server, beat(10))
    assert history.progress["step"] == 10
    history.read(server, beat(7))
    assert history.progress["step"] == 10


def test_a_job_that_was_taken_up_again_begins_anew() -> None:
    server, history = Server(), History(JOB)
    history.read(server, beat(30))
    history.read(server, beat(30, attempt=2))
    history.read(server, beat(30, attempt=2))
    assert history.progress == {}
    server.add("metrics", step=2)
    history.read(server, beat(30, attempt=2))
    assert history.progress == {"step": 2}


def test_without_a_terminal_there_is_a_line_for_every_tenth(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch, "POLL_SECONDS", 0)
    steps = [beat(step) for step in range(1, 41)]
    server = Server(JOB, *steps, beat(40, status="succeeded"))
    assert watch.follow(server, JOB | {"status": "queued"})["status"] == "succeeded"
    written = capsys.readouterr()
    queued, running, *lines = written.err.splitlines()
    assert ("queued, waiting" in queued, running) == (True, "running")
    assert lines == [f"step {step}/40" for step in (1, *range(4, 41, 4))]
    assert written.out == ""
