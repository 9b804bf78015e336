"""One tiny model for all tests of the server, and an app around a fake engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog
from starlette.testclient import TestClient

from prefix_store.model.frozen import FrozenModel
from prefix_store.model.prompt import encode
from prefix_store.store import Store
from server.app import create_app
from server.engine.prefix_loader import PrefixLoader
from tests.models import tiny_frozen
from tests.server.fakes import FakeLoop

ANSWER = "Hällo wörld 你好 😀"
Serve = Callable[..., TestClient]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def frozen() -> FrozenModel:
    return tiny_frozen("llama")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(f"sqlite:///{tmp_path}/store.db")
    yield opened
    opened.close()


@pytest.fixture
def loop(frozen: FrozenModel) -> FakeLoop:
    ids = encode(frozen.tokenizer, ANSWER)[1:]  # without BOS
    return FakeLoop(lambda request: ids)


@pytest.fixture
def serve(store: Store, frozen: FrozenModel, loop: FakeLoop) -> Serve:
    """Makes a client of an app with the given options."""

    def make(**options: object) -> TestClient:
        app = create_app(store, frozen, loop, PrefixLoader(store.prefixes, frozen, 1 << 20), **options)
        return TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False)

    return make


@pytest.fixture
def client(serve: Serve) -> TestClient:
    return serve()
