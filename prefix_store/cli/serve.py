"""`antefix serve` and `antefix worker`: the processes, started by name and never imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from types import FrameType
from typing import Annotated

import typer

POLL_SECONDS = 0.1
# The first process answers users, the others share its cores. A fair share would cost it most of its speed, because
# threads that wait for one another at every layer all wait for the one that was put aside.
BESIDE_NICENESS = 15
# Server and worker give what runs a second or two; what has not ended by then does not end by itself.
STOP_SECONDS = 10.0


def serve(
    worker: Annotated[bool, typer.Option("--worker", help="Train here too, in a second process.")] = False,
) -> None:
    """Serve prefixes over HTTP until Ctrl-C. Settings are ANTEFIX_… variables."""
    raise typer.Exit(supervise(["server", "trainer"] if worker else ["server"]))


def work() -> None:
    """Train what is queued in the store until Ctrl-C."""
    raise typer.Exit(supervise(["trainer"]))


@dataclass(frozen=True)
class Child:
    """A process of ours, named by its module."""

    module: str
    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, module: str, niceness: int) -> Child:
        """Starts it in a session of its own, so that a terminal's Ctrl-C reaches it once, through us."""
        process = subprocess.Popen([sys.executable, "-m", module], start_new_session=True)
        os.setpriority(os.PRIO_PROCESS, process.pid, os.getpriority(os.PRIO_PROCESS, 0) + niceness)
        return cls(module, process)


def supervise(modules: list[str]) -> int:
    """Runs the modules until one ends or we are told to stop, then stops all; the exit status of the first.

    If another one ended by itself, that is said, and the status is never 0.
    """
    stopping = _Stopping()
    children = [Child.start(module, BESIDE_NICENESS if number else 0) for number, module in enumerate(modules)]
    while not stopping.asked and all(child.process.poll() is None for child in children):
        time.sleep(POLL_SECONDS)
    ended = next((child for child in children if child.process.poll() is not None), None)
    if ended is not None and not stopping.asked and len(children) > 1:
        typer.echo(f"antefix: {ended.module} ended ({_how(ended)}); stopping the rest", err=True)
    _stop(children)
    status = _status(children[0])
    return status if ended in (None, children[0]) or stopping.asked else status or 1


class _Stopping:
    """Notes SIGINT and SIGTERM instead of dying of them."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


def _stop(children: list[Child]) -> None:
    for child in children:
        if child.process.poll() is None:
            child.process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for child in children:
        try:
            child.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            typer.echo(f"antefix: {child.module} does not stop; killing it", err=True)
            child.process.kill()
            child.process.wait()


def _status(child: Child) -> int:
    """As a shell gives it: 128 and the signal's number for a process that a signal ended."""
    code = child.process.returncode
    return code if code >= 0 else 128 - code


def _how(child: Child) -> str:
    status = child.process.returncode
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
