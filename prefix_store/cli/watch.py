"""A training job as it goes, on stderr: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol

import typer

from prefix_store.cli.client import Client
from prefix_store.cli.terminal import clock, is_live, printable
from prefix_store.jobs import JobStatus

POLL_SECONDS = 0.5
WAITS = "queued, waiting for a worker of its model and method; if none runs, start one: antefix worker"
SILENCE = 10  # seconds without a heartbeat, of which there is one in four, that are worth a word
LINES = 10  # a run, where there is no bar
FORMS = {
    "train_loss": "loss {:.3f}",
    "valid_loss": "validation {:.3f}",
    "learning_rate": "rate {:.2g}",
    "tokens_per_second": "{:,.0f} tokens/s",
}
# A paused job does not go on by itself, so nobody waits for it.
FINAL = frozenset(status for status in JobStatus if status.is_final or status is JobStatus.PAUSED)


def follow(server: Client, job: dict[str, Any]) -> dict[str, Any]:
    """Shows the job until it has ended or rests, and returns it as it is then. Raises Failure."""
    history, display = History(job), _Bar(job) if is_live(sys.stderr) else _Lines()
    try:
        while True:
            for message in history.read(server, job):
                display.say(printable(message))
            display.show(job, history.progress)
            if job["status"] in FINAL:
                return job
            time.sleep(POLL_SECONDS)
            job = server.get(f"/v1/jobs/{job['id']}")
    finally:
        display.close()


class History:
    """What is known of a job's progress: every number's last value.

    Heartbeats and events tell the same numbers, each at times of their own; only some steps validate. A job that was
    taken up again goes on from its last checkpoint, and its old heartbeat no longer counts.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self.progress: dict[str, Any] = {}
        self._attempt: int = job["attempt"]
        self._beat: dict[str, Any] = {}
        self._after = 0

    def read(self, server: Client, job: dict[str, Any]) -> list[str]:
        """Takes in what is new and returns what the worker said."""
        if job["attempt"] != self._attempt:
            self._attempt, self.progress = job["attempt"], {}
        elif job["progress"] != self._beat and job["progress"].get("step", 0) > self.progress.get("step", 0):
            self._take(job["progress"])
        self._beat = job["progress"]
        said = []
        for event in server.pages(f"/v1/jobs/{job['id']}/events", "sequence", after=self._after):
            self._after = event["sequence"]
            if event["type"] == "message":
                said.append(event["data"]["message"])
            elif event["type"] == "metrics":
                self._take(event["data"])
        return said

    def _take(self, progress: dict[str, Any]) -> None:
        self.progress |= {name: value for name, value in progress.items() if value is not None}


def numbers(job: dict[str, Any], progress: dict[str, Any]) -> str:
    """Step, losses, rate, speed and time left, as far as they are known."""
    if "step" not in progress:
        return WAITS if job["status"] == JobStatus.QUEUED else printable("  ".join([job["status"], *silence(job)]))
    step = f"step {progress['step']}/{_total(job, progress) or '?'}"
    return printable("  ".join([step, *figures(progress), *silence(job)]))


def figures(progress: dict[str, Any]) -> list[str]:
    """What a job's progress tells beside its step."""
    parts = [form.format(progress[name]) for name, form in FORMS.items() if progress.get(name) is not None]
    if progress.get("seconds_left") is not None:
        parts.append(f"{clock(progress['seconds_left'])} left")
    return parts


def silence(job: dict[str, Any]) -> list[str]:
    """A word on a running job whose worker is no longer heard of; another takes it when its lease has run out."""
    seconds = job.get("silent_seconds") or 0
    return [f"no sign of life for {seconds} s"] if seconds >= SILENCE else []


def _total(job: dict[str, Any], progress: dict[str, Any]) -> Any:
    """The steps of the whole run; None until the worker has chosen them."""
    return progress.get("total_steps") or job["options"]["steps"]


class _Display(Protocol):
    def say(self, message: str) -> None: ...
    def show(self, job: dict[str, Any], progress: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class _Lines:
    def __init__(self) -> None:
        self._shown: object = None

    def say(self, message: str) -> None:
        typer.echo(message, err=True)

    def show(self, job: dict[str, Any], progress: dict[str, Any]) -> None:
        """A line when the job's state changes or its worker falls silent, and then for every tenth of its steps."""
        total = _total(job, progress)
        share = LINES * progress["step"] // total if total and "step" in progress else job["status"]
        share = "silent" if silence(job) else share
        if share not in (self._shown, *FINAL):
            self._shown = share
            self.say(numbers(job, progress))

    def close(self) -> None:
        pass


class _Bar:
    def __init__(self, job: dict[str, Any]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        # where it is narrow, the bar gives way to the figures
        figures = TextColumn("{task.fields[numbers]}", markup=False, table_column=Column(no_wrap=True))
        bar = BarColumn(bar_width=None, table_column=Column(max_width=40))
        self._bar = Progress(bar, figures, console=Console(stderr=True))
        self._task = self._bar.add_task("", total=None, numbers="")
        self._bar.start()

    def say(self, message: str) -> None:
        self._bar.console.print(message, markup=False, highlight=False, emoji=False)

    def show(self, job: dict[str, Any], progress: dict[str, Any]) -> None:
        total, done = _total(job, progress), progress.get("step", 0)
        self._bar.update(self._task, total=total, completed=done, numbers=numbers(job, progress))

    def close(self) -> None:
        self._bar.stop()
