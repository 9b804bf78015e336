import threading
import time

import pytest
from starlette.testclient import TestClient

from prefix_store.store import Store
from server.api import reach
from tests.server.conftest import Serve
from tests.server.fakes import FakeLoop


@pytest.mark.parametrize("path", ["/healthz", "/health"])
def test_the_process_is_up(client: TestClient, path: str) -> None:
    assert client.get(path).json() == {"status": "ok"}


def ready(client: TestClient, **params: str) -> tuple[int, str, bool, bool]:
    reply = client.get("/readyz", params=params)
    found = reply.json()
    return reply.status_code, found["status"], found["model"], found["store"]


def test_without_its_store_a_server_stays_ready_and_says_so(serve: Serve, store: Store) -> None:
    client = serve()
    assert ready(client) == ready(client, store="1") == (200, "ready", True, True)
    store.close()
    assert ready(client) == (200, "degraded", True, False)
    assert ready(client, store="1") == (503, "degraded", True, False)


def test_a_store_that_hangs_holds_up_no_probe_and_is_asked_once_at_a_time(
    serve: Serve, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    goes_on = threading.Event()

    def hangs() -> None:
        asked.append(1)
        goes_on.wait(30)

    monkeypatch.setattr(reach, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(store, "ping", hangs)
    client = serve()
    begun = time.monotonic()
    assert ready(client) == ready(client) == (200, "degraded", True, False)
    assert (time.monotonic() - begun < 5, len(asked)) == (True, 1)
    goes_on.set()
    deadline = time.monotonic() + 10
    while ready(client)[1] != "ready":
        assert time.monotonic() < deadline


def test_a_failed_engine_is_not_ready(client: TestClient, loop: FakeLoop) -> None:
    loop.stop()
    assert ready(client) == (503, "failed", False, True)


def test_metrics_are_in_prometheus_s_text_format(client: TestClient) -> None:
    reply = client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    for name in ("antefix_num_requests_running", "antefix_num_requests_waiting", "antefix_store_up"):
        assert f"\n{name} " in reply.text


def test_shutting_down_stops_the_engine_and_closes_the_store(serve: Serve, loop: FakeLoop) -> None:
    with serve() as client:
        assert client.get("/healthz").status_code == 200
        assert not loop.stopped
    assert loop.stopped
