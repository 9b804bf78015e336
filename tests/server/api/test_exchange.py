from typing import Any

import pytest
import structlog
from starlette.requests import ClientDisconnect
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from server.api.exchange import CLIENT_LEFT, Exchange
from server.metrics import Metrics
from tests.server.fakes import stats


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

    metrics = Metrics(stats, dict)
    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    await Exchange(leaves, metrics)(scope, nothing, nothing)
    assert metrics.responses.labels("none", str(CLIENT_LEFT))._value.get() == 1
