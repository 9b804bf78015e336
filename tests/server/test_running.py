import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import pytest
import torch
from fastapi import FastAPI

from server import running
from server.api.drain import Drain
from server.engine.engine import Engine
from server.engine.loop import EngineLoop
from server.scheduler.scheduler import Limits
from tests.models import tiny_frozen


@pytest.fixture
def loop() -> EngineLoop:
    return EngineLoop(Engine(tiny_frozen("llama"), Limits(1024, 4, 32, 200, 6)))


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


@pytest.fixture(autouse=True)
def as_found() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_both(loop: EngineLoop, listener: socket.socket, number: int) -> None:
    running.run(FastAPI(), listener, loop, Drain(30), lambda: os.kill(os.getpid(), number))
    assert not loop.is_alive
    assert "http" not in [thread.name for thread in threading.enumerate()]


def test_only_the_engines_thread_computes_with_more_than_itself(
    loop: EngineLoop, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(3)
    seen: dict[str, int] = {}

    def ready() -> None:
        seen["http"] = torch.get_num_threads()
        with ThreadPoolExecutor(1) as pool:  # as those that read prefixes
            seen["another"] = pool.submit(torch.get_num_threads).result()
        loop.abort("something for the engine to do")

    def scheduled(end_early: object = loop._end_early) -> list[object]:
        seen["engine"] = torch.get_num_threads()
        os.kill(os.getpid(), signal.SIGTERM)
        return end_early()

    monkeypatch.setattr(loop, "_end_early", scheduled)
    running.run(FastAPI(), listener, loop, Drain(), ready)
    assert seen == {"engine": 3, "http": 1, "another": 1}


def test_an_app_that_does_not_start_ends_the_engine_too(loop: EngineLoop, listener: socket.socket) -> None:
    @asynccontextmanager
    async def fails(app: FastAPI) -> AsyncIterator[None]:
        raise OSError("no store")
        yield

    with pytest.raises(SystemExit) as ended:
        running.run(FastAPI(lifespan=fails), listener, loop, Drain(), lambda: None)
    assert ended.value.code == 1
    assert not loop.is_alive


def test_an_engine_that_dies_ends_the_server_once_what_runs_is_answered(
    loop: EngineLoop, listener: socket.socket
) -> None:
    drain, seen = Drain(30), []
    drain.running = 1  # a request

    def answered() -> None:
        seen.append((loop.has_failed, drain.has_begun))
        drain.running = 0

    def die() -> int:
        threading.Timer(0.3, answered).start()
        return 1 // 0

    loop._engine.scheduler.schedule = die  # type: ignore[method-assign]
    with pytest.raises(SystemExit) as ended:
        running.run(FastAPI(), listener, loop, drain, lambda: loop.abort("something to do"))
    assert (ended.value.code, seen) == (1, [(True, True)])
