"""The engine in the main thread and HTTP beside it, until a signal.

For each thread that computes, OpenMP keeps a team of threads. As soon as these teams together outnumber the cores,
their members wait for one another asleep instead of awake, and every step takes a tenth longer. So only the thread
that has loaded the model computes with more than itself.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Protocol as Interface

import torch
import uvicorn
from starlette.types import ASGIApp

from server.api.drain import Drain
from server.api.wire import Protocol

# What running requests get to finish in at Ctrl-C; `Drain` knows what they get at SIGTERM.
SHUTDOWN_SECONDS = 1
POLL_SECONDS = 0.05


class Loop(Interface):
    """What the main thread does. `has_failed`: it ended, and not because of `stop`."""

    has_failed: bool

    def run(self) -> None:
        """Until `stop`."""

    def stop(self) -> None:
        """From any thread."""


def run(app: ASGIApp, listener: socket.socket, loop: Loop, drain: Drain, on_ready: Callable[[], None]) -> None:
    """Runs the engine in the calling thread, the main one; `on_ready` is called when HTTP answers.

    SIGTERM drains; SIGINT, and any second signal, ends it. An engine that fails drains too, for a new process helps and
    this one does not. Raises SystemExit with status 1 then, and if HTTP never answered; why is in the log.
    """
    config = uvicorn.Config(
        app,
        http=Protocol,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        # the engine has ended all calls by then; this is for a client that does not read
        timeout_graceful_shutdown=SHUTDOWN_SECONDS + 1,
        timeout_keep_alive=75,
    )
    server = _Server(config, loop, drain, on_ready)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, server.handle_exit)
    answering = threading.Thread(target=_answer, args=(server, listener, loop), name="http", daemon=True)
    answering.start()
    loop.run()
    if loop.has_failed:
        drain.begin()
    answering.join()
    if loop.has_failed or not server.started:
        raise SystemExit(1)


def _answer(server: uvicorn.Server, listener: socket.socket, loop: Loop) -> None:
    torch.set_num_threads(1)  # of this thread, and of each that has not computed yet
    try:
        with suppress(SystemExit):  # of a start that failed, after uvicorn has logged why; `run` sees it
            server.run(sockets=[listener])
    finally:
        loop.stop()


class _Server(uvicorn.Server):
    """Says when it answers, not before; when it stops, what still runs after a while is told so."""

    def __init__(self, config: uvicorn.Config, loop: Loop, drain: Drain, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._loop = loop
        self._drain = drain
        self._on_ready = on_ready
        self._hurries = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """In the main thread, in the middle of a step: takes no lock."""
        self._hurries = self._drain.has_begun
        self._drain.begin()
        self.should_exit = self._hurries or sig == signal.SIGINT or self.should_exit

    async def on_tick(self, counter: int) -> bool:
        self.should_exit = self.should_exit or self._drain.is_over
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end_running())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end_running(self) -> None:
        until = time.monotonic() + SHUTDOWN_SECONDS
        while time.monotonic() < until and not (self._hurries or self._drain.is_late):
            await asyncio.sleep(POLL_SECONDS)
        self._loop.stop()
