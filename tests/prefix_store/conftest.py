"""Stores of every kind: embedded, and in real servers that the tests start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis

from prefix_store.backends.base import Backend, Blobs
from prefix_store.store import Store
from tests.prefix_store.samples import Clock
from tests.redis_server import RedisServer, program, running

SERVERS = ("redis", "valkey")
KINDS = ("sqlite", *SERVERS)


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], RedisServer]]:
    """One server of each kind, started when it is first asked for, and empty for every test."""
    started: dict[str, RedisServer] = {}
    with ExitStack() as stack:

        def empty(kind: str) -> RedisServer:
            if program(kind) is None:
                pytest.skip(f"no package brings a {kind} server for this machine")
            if kind not in started:
                started[kind] = stack.enter_context(running(kind, tmp_path_factory.mktemp(kind)))
            with redis.Redis.from_url(started[kind].url) as client:
                client.flushall()
            return started[kind]

        yield empty


@pytest.fixture
def fresh_server(tmp_path: Path) -> Iterator[Callable[[str], RedisServer]]:
    """A server of the test's own, to be stopped and started."""
    with ExitStack() as stack:

        def start(kind: str) -> RedisServer:
            if program(kind) is None:
                pytest.skip(f"no package brings a {kind} server for this machine")
            return stack.enter_context(running(kind, tmp_path))

        yield start


# Valkey speaks as Redis does: what it is asked through the backends' contracts is enough for every day.
@pytest.fixture(params=["sqlite", "redis", pytest.param("valkey", marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def url(kind: str, tmp_path: Path, servers: Callable[[str], RedisServer]) -> str:
    """The address of a store that is not there yet."""
    return servers(kind).url if kind in SERVERS else f"sqlite:///{tmp_path}/store.db"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(url: str, clock: Clock) -> Iterator[Store]:
    opened = Store.open(url, clock=clock)
    yield opened
    opened.close()


@pytest.fixture
def backend(store: Store) -> Backend:
    return store.backend


@pytest.fixture
def blobs(store: Store) -> Blobs:
    return store.blobs
