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
from collections.abc import Callable
from contextlib import suppress

import torch
import uvicorn
from fastapi import FastAPI

from server.api.wire import Protocol
from server.engine.loop import EngineLoop

# What running requests get to finish in once the server was told to stop.
SHUTDOWN_SECONDS = 1


def run(app: FastAPI, listener: socket.socket, loop: EngineLoop, on_ready: Callable[[], None]) -> None:
    """Runs the engine in the calling thread, the main one; `on_ready` is called when HTTP answers.

    Raises SystemExit with status 1 if it never did; why is in the log.
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
    server = _Server(config, loop, on_ready)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, server.handle_exit)
    answering = threading.Thread(target=_answer, args=(server, listener, loop), name="http", daemon=True)
    answering.start()
    loop.run()
    answering.join()
    if not server.started:
        raise SystemExit(1)


def _answer(server: uvicorn.Server, listener: socket.socket, loop: EngineLoop) -> None:
    torch.set_num_threads(1)  # of this thread, and of each that has not computed yet
    try:
        with suppress(SystemExit):  # of a start that failed, after uvicorn has logged why; `run` sees it
            server.run(sockets=[listener])
    finally:
        loop.stop()


class _Server(uvicorn.Server):
    """Says when it answers, not before; when it stops, what still runs after a while is told so."""

    def __init__(self, config: uvicorn.Config, loop: EngineLoop, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._loop = loop
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(SHUTDOWN_SECONDS, self._loop.stop)
        await super().shutdown(sockets)
