"""A server on a real port around a fake engine, and the command pointed at it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import structlog
import uvicorn
from typer.testing import CliRunner, Result

from prefix_store.cli import build, client
from prefix_store.model.frozen import FrozenModel
from prefix_store.model.prompt import encode
from prefix_store.store import Store
from server.app import create_app
from server.engine.prefix_loader import PrefixLoader
from tests.models import tiny_frozen
from tests.server.fakes import FakeLoop

ANSWER = "Hällo 你好"
HOSTILE, SPELT = "\x1b[2J\u200f", "\\x1b[2J\\u200f"
Antefix = Callable[..., Result]
Instead = Callable[[Callable[[httpx.Request], httpx.Response]], None]


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    url: str
    store: Store
    frozen: FrozenModel
    loop: FakeLoop


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    store = Store.open(f"sqlite:///{tmp_path_factory.mktemp('store')}/store.db")
    frozen = tiny_frozen("llama")
    ids = encode(frozen.tokenizer, ANSWER)[1:]
    loop = FakeLoop(lambda request: ids)
    app = create_app(store, frozen, loop, PrefixLoader(store.prefixes, frozen, 1 << 20))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    with structlog.testing.capture_logs():
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield Running(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", store, frozen, loop)
        server.should_exit = True
        thread.join()


@pytest.fixture
def antefix(running: Running, monkeypatch: pytest.MonkeyPatch) -> Antefix:
    """Runs the command with arguments; its result has `exit_code`, `stdout` and `stderr`."""
    monkeypatch.setenv("ANTEFIX_URL", running.url)
    monkeypatch.delenv("ANTEFIX_API_KEY", raising=False)

    def run(*arguments: str | Path) -> Result:
        return CliRunner().invoke(build(), [str(argument) for argument in arguments])

    return run


@pytest.fixture
def instead(monkeypatch: pytest.MonkeyPatch) -> Instead:
    """Lets the commands meet what a test answers with, instead of a server."""

    def use(answer: Callable[[httpx.Request], httpx.Response]) -> None:
        def http() -> httpx.Client:
            return httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer))

        monkeypatch.setattr(client, "_http", http)

    return use
