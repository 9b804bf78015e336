import pytest
from starlette.testclient import TestClient

from prefix_store.errors import StoreUnavailable
from prefix_store.store import Store
from tests.server.conftest import Serve
from tests.server.fakes import FakeLoop


@pytest.mark.parametrize("path", ["/healthz", "/health"])
def test_the_process_is_up(client: TestClient, path: str) -> None:
    assert client.get(path).json() == {"status": "ok"}


def test_ready_means_that_the_store_answers(client: TestClient, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert client.get("/readyz").json() == {"model": True, "store": True}

    def away() -> None:
        raise StoreUnavailable("gone")

    monkeypatch.setattr(store, "ping", away)
    reply = client.get("/readyz")
    assert (reply.status_code, reply.json()) == (503, {"model": True, "store": False})


def test_metrics_are_in_prometheus_s_text_format(client: TestClient) -> None:
    reply = client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    for name in ("antefix_num_requests_running", "antefix_num_requests_waiting", "antefix_prefixes_resident"):
        assert f"\n{name} " in reply.text


def test_shutting_down_stops_the_engine_and_closes_the_store(serve: Serve, loop: FakeLoop) -> None:
    with serve() as client:
        assert client.get("/healthz").status_code == 200
        assert not loop.stopped
    assert loop.stopped
