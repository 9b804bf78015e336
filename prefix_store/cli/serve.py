"""`antefix serve` and `antefix worker`: the processes, started by name and never imported."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Annotated

import typer

from prefix_store.cli.client import fail

PR_SET_PDEATHSIG = 1
TELLS = "server"  # says when it takes requests
POLL_SECONDS = 0.1
RESTART_SECONDS, RESTART_SECONDS_MOST = 1.0, 60.0
# What has run for so long is started again as quickly as at the first time.
STEADY_SECONDS = 300.0
# The first process answers users, the others share its cores. A fair share would cost it most of its speed, because
# threads that wait for one another at every layer all wait for the one that was put aside.
BESIDE_NICENESS = 15
# What has not ended by then does not end by itself. At SIGTERM the server gives what runs its time before.
STOP_SECONDS = 10.0
DRAIN_SECONDS = 20.0  # where ANTEFIX_DRAIN_SECONDS is not set, as the server has it


def serve(
    worker: Annotated[bool, typer.Option("--worker", help="Train here too, in a second process.")] = False,
    ray: Annotated[bool, typer.Option("--ray", help="Serve from several replicas, by Ray Serve.")] = False,
    replicas: Annotated[int | None, typer.Option(help="With --ray: always so many.", min=1)] = None,
    min_replicas: Annotated[int, typer.Option(help="With --ray: at least so many.", min=1)] = 1,
    max_replicas: Annotated[int | None, typer.Option(help="With --ray: up to so many, by the queue.", min=1)] = None,
) -> None:
    """Serve prefixes over HTTP until Ctrl-C; SIGTERM lets what runs end. Settings are ANTEFIX_… variables."""
    if ray:
        fewest, most = replicas or min_replicas, replicas or max_replicas or min_replicas
        if worker or most < fewest:
            fail(
                "--ray takes no --worker, for `antefix worker` trains; and no fewer --max-replicas than --min-replicas"
            )
        amounts = [f"--min-replicas={fewest}", f"--max-replicas={most}"]
        os.execv(sys.executable, [sys.executable, "-m", "server.cluster", *amounts])
    raise typer.Exit(supervise(["server", "trainer"] if worker else ["server"]))


def work() -> None:
    """Train what is queued in the store until Ctrl-C."""
    raise typer.Exit(supervise(["trainer"]))


@dataclass
class Child:
    """A process of ours, named by its module. `ready_fd` is where it says that it takes requests, if it does."""

    module: str
    process: subprocess.Popen[bytes]
    ready_fd: int | None
    started: float
    is_ready: bool = False

    @classmethod
    def start(cls, module: str, *, is_first: bool) -> Child:
        """Starts it in a session of its own, so that a terminal's Ctrl-C reaches it once, through us."""
        command = [sys.executable, "-m", module]
        told, tells = os.pipe() if module == TELLS else (None, None)
        if tells is not None:
            command += ["--ready-fd", str(tells)]
        process = subprocess.Popen(
            command,
            start_new_session=True,
            preexec_fn=_end_with_parent,
            pass_fds=() if tells is None else (tells,),
        )
        niceness = 0 if is_first else BESIDE_NICENESS
        os.setpriority(os.PRIO_PROCESS, process.pid, os.getpriority(os.PRIO_PROCESS, 0) + niceness)
        if told is not None and tells is not None:
            os.close(tells)
            os.set_blocking(told, False)
        return cls(module, process, told, time.monotonic())

    def hear(self) -> None:
        """Notes whether it takes requests now."""
        if self.ready_fd is not None:
            with suppress(BlockingIOError):
                self.is_ready = bool(os.read(self.ready_fd, 1))
                os.close(self.ready_fd)
                self.ready_fd = None


def _end_with_parent() -> None:
    """Asks Linux to end this process when the one that started it is killed outright; elsewhere it lives on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def supervise(modules: list[str]) -> int:
    """Runs the modules until the first has ended or we are told to stop, then stops all; the exit status of the first.

    One that dies is started again, each time after twice as long: a trainer that dies of its job must not end serving.
    The first ends all of it with status 0, or when it cannot start: if it never took a request, it never will.
    """
    signals = _Signals()
    children = [Child.start(module, is_first=number == 0) for number, module in enumerate(modules)]
    restarts = [Restart() for _ in modules]
    has_served = False
    while not signals.heard:
        status = children[0].process.poll()
        children[0].hear()
        has_served = has_served or children[0].is_ready
        if status is not None and not (status and has_served):
            break
        for number, child in enumerate(children):
            if child.process.poll() is not None:
                children[number] = restarts[number].after(child, is_first=number == 0)
        time.sleep(POLL_SECONDS)
    if not signals.heard and len(children) > 1:
        typer.echo(f"antefix: {children[0].module} ended ({_how(children[0])}); stopping the rest", err=True)
    _stop(children, signals)
    return _status(children[0])


@dataclass
class Restart:
    """When a child that has ended is started again."""

    delay: float = RESTART_SECONDS
    due: float | None = None

    def after(self, child: Child, *, is_first: bool) -> Child:
        """The same child until it is due, then a new one."""
        now = time.monotonic()
        if self.due is None:
            if now - child.started > STEADY_SECONDS:
                self.delay = RESTART_SECONDS
            typer.echo(f"antefix: {child.module} ended ({_how(child)}); again in {self.delay:g} s", err=True)
            self.due, self.delay = now + self.delay, min(2 * self.delay, RESTART_SECONDS_MOST)
        if now < self.due:
            return child
        self.due = None
        return Child.start(child.module, is_first=is_first)


class _Signals:
    """Notes SIGINT, SIGTERM and a closed terminal's SIGHUP instead of dying of them."""

    def __init__(self) -> None:
        self.heard: list[int] = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup asks to outlive the terminal
            signal.signal(signal.SIGHUP, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.heard.append(number)

    @property
    def hurry(self) -> bool:
        """Whether a person waits: Ctrl-C, or whoever asks a second time."""
        return len(self.heard) > 1 or signal.SIGINT in self.heard or signal.SIGHUP in self.heard


def _stop(children: list[Child], signals: _Signals) -> None:
    """Passes signals on until all have ended; what is too late is killed."""
    begun, passed = time.monotonic(), -1
    while any(child.process.poll() is None for child in children):
        if passed < len(signals.heard):
            passed = len(signals.heard)
            _tell(children, hurry=signals.hurry)
        if time.monotonic() > begun + STOP_SECONDS + (0.0 if signals.hurry else _drain_seconds()):
            _kill(children)
        time.sleep(POLL_SECONDS)


def _tell(children: list[Child], *, hurry: bool) -> None:
    for child in children:
        if child.process.poll() is None:
            child.hear()
            # only a server that is up tells the two apart
            child.process.send_signal(signal.SIGINT if hurry and child.is_ready else signal.SIGTERM)


def _kill(children: list[Child]) -> None:
    for child in children:
        if child.process.poll() is None:
            typer.echo(f"antefix: {child.module} does not stop; killing it", err=True)
            child.process.kill()
            child.process.wait()


def _drain_seconds() -> float:
    """What the server gives running requests; it has refused to start with a value that is no number."""
    try:
        return float(os.environ.get("ANTEFIX_DRAIN_SECONDS") or DRAIN_SECONDS)
    except ValueError:
        return DRAIN_SECONDS


def _status(child: Child) -> int:
    """As a shell gives it: 128 and the signal's number for a process that a signal ended."""
    code = child.process.returncode
    return code if code >= 0 else 128 - code


def _how(child: Child) -> str:
    status = child.process.returncode
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
