"""`antefix serve` and `antefix worker`: the processes, started by name and never imported."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from types import FrameType
from typing import Annotated

import typer

PR_SET_PDEATHSIG = 1
POLL_SECONDS = 0.1
RESTART_SECONDS, RESTART_SECONDS_MOST = 1.0, 60.0
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
        process = subprocess.Popen([sys.executable, "-m", module], start_new_session=True, preexec_fn=_end_with_parent)
        os.setpriority(os.PRIO_PROCESS, process.pid, os.getpriority(os.PRIO_PROCESS, 0) + niceness)
        return cls(module, process)


def _end_with_parent() -> None:
    """Asks Linux to end this process when the one that started it is killed outright; elsewhere it lives on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def supervise(modules: list[str]) -> int:
    """Runs the modules until the first ends or we are told to stop, then stops all; the exit status of the first.

    Another one that ends by itself is started again, each time after twice as long: a trainer that dies of its job
    must not end serving.
    """
    stopping = _Stopping()
    children = [Child.start(module, BESIDE_NICENESS if number else 0) for number, module in enumerate(modules)]
    restarts: dict[str, Restart] = {}
    while not stopping.asked and children[0].process.poll() is None:
        for number, child in enumerate(children[1:], start=1):
            if child.process.poll() is not None:
                children[number] = restarts.setdefault(child.module, Restart()).after(child)
        time.sleep(POLL_SECONDS)
    if not stopping.asked and len(children) > 1:
        typer.echo(f"antefix: {children[0].module} ended ({_how(children[0])}); stopping the rest", err=True)
    _stop(children)
    return _status(children[0])


@dataclass
class Restart:
    """When a child that has ended is started again."""

    delay: float = RESTART_SECONDS
    due: float | None = None

    def after(self, child: Child) -> Child:
        """The same child until it is due, then a new one."""
        now = time.monotonic()
        if self.due is None:
            typer.echo(f"antefix: {child.module} ended ({_how(child)}); again in {self.delay:g} s", err=True)
            self.due, self.delay = now + self.delay, min(2 * self.delay, RESTART_SECONDS_MOST)
        if now < self.due:
            return child
        self.due = None
        return Child.start(child.module, BESIDE_NICENESS)


class _Stopping:
    """Notes SIGINT, SIGTERM and a closed terminal's SIGHUP instead of dying of them."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup asks to outlive the terminal
            signal.signal(signal.SIGHUP, self._ask)

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
