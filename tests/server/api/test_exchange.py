from typing import Any

import httpx
import pytest
import structlog
from starlette.requests import ClientDisconnect
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from prefix_store.store import Store
from server.api.exchange import CLIENT_LEFT, Exchange
from tests.server import fakes, over_http
from tests.server.api.test_auth import key


@pytest.mark.parametrize("offered", ["abc", "A-1_2.3", "x" * 64])
def test_a_fit_id_is_kept(client: TestClient, offered: str) -> None:
    assert client.get("/healthz", headers={"x-request-id": offered}).headers["x-request-id"] == offered


@pytest.mark.parametrize("offered", ["", "x" * 65, "a b", "a\tb", '"', "{}"])
def test_an_unfit_id_is_replaced(client: TestClient, offered: str) -> None:
    got = client.get("/healthz", headers={"x-request-id": offered}).headers["x-request-id"]
    assert got != offered
    assert len(got) == 32


def test_replies_are_counted_by_route_and_never_by_path(client: TestClient) -> None:
    client.get("/v1/jobs/some-id")
    client.get("/made/up")
    text = client.get("/metrics").text
    assert 'antefix_http_responses_total{route="/v1/jobs/{job_id}",status="404"} 1.0' in text
    assert 'antefix_http_responses_total{route="none",status="404"} 1.0' in text
    assert "made" not in text


def test_one_log_line_a_request_that_holds_no_text(client: TestClient) -> None:
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as lines:
        client.post("/generate", json={"prompt": "very secret"}, headers={"x-request-id": "r1"})
    (line,) = lines
    assert (line["route"], line["status"], line["request_id"], line["tenant"]) == ("/generate", 200, "r1", "default")
    assert line["finish_reasons"] == {"stop": 1}
    assert line["completion_tokens"] > 0
    assert "secret" not in str(lines)


@pytest.mark.anyio
async def test_a_client_that_left_is_no_failure() -> None:
    async def leaves(scope: Scope, receive: Receive, send: Send) -> None:
        raise ClientDisconnect

    async def nothing(*_: Any) -> dict[str, Any]:
        return {}

    metrics = fakes.metrics()
    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    await Exchange(leaves, metrics)(scope, nothing, nothing)
    assert metrics.responses.labels("none", str(CLIENT_LEFT))._value.get() == 1


@pytest.mark.parametrize(
    "path",
    ["/healthz", "/health", "/readyz", "/metrics", "/v1/models", "/v1/models/tiny-llama", "/v1/model", "/openapi.json"],
)
def test_head_is_get_without_the_body(client: TestClient, path: str) -> None:
    asked, told = client.get(path), client.head(path)
    assert (asked.status_code, told.status_code) == (200, 200)
    assert asked.content
    assert told.content == b""
    assert told.headers["content-type"] == asked.headers["content-type"]
    if path != "/metrics":  # which counts these very requests
        assert told.headers["content-length"] == str(len(asked.content))


def test_head_asks_for_the_scope_that_get_does(client: TestClient, store: Store) -> None:
    reader, trainer = key(store, "generate"), key(store, "train")
    assert client.head("/v1/models").status_code == 401
    assert client.head("/v1/models", headers=trainer).status_code == 403
    assert client.head("/v1/models", headers=reader).status_code == 200
    assert client.head("/v1/models/none", headers=reader).status_code == 404


def test_the_log_says_head(client: TestClient) -> None:
    with structlog.testing.capture_logs() as lines:
        client.head("/healthz")
    assert [(line["method"], line["route"], line["status"]) for line in lines] == [("HEAD", "/healthz", 200)]


def test_head_over_a_real_connection_leaves_it_fit_for_the_next_request(client: TestClient) -> None:
    with over_http.serving(client.app) as address, httpx.Client(base_url=address) as known:
        for _ in range(2):
            told = known.head("/v1/models")
            assert (told.status_code, told.content) == (200, b"")
            asked = known.get("/v1/models")
            assert (asked.status_code, told.headers["content-length"]) == (200, str(len(asked.content)))
