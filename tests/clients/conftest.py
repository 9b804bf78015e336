"""One real server, with the bundled model and prefixes, for all clients that a process tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients.calls import Expected
from tests.e2e.processes import SERVER, Running


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running.start(tmp_path_factory.mktemp("clients"), *SERVER)
    try:
        yield running
    finally:
        running.close()


@pytest.fixture(scope="session")
def url(server: Running) -> str:
    return str(server.client.base_url).rstrip("/")


@pytest.fixture(scope="session")
def expected(server: Running) -> Expected:
    return Expected.of(server.client)
