import asyncio
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient
from starlette.types import Message

from prefix_store.errors import RequestTimeout
from server.api import errors, limits
from tests.server.conftest import Serve


def chunks(size: int) -> Iterator[bytes]:
    """A body that declares no length."""
    for _ in range(size // limits.MB + 1):
        yield b" " * limits.MB


@pytest.fixture
def client(serve: Serve) -> TestClient:
    return serve(max_upload_mb=1)


@pytest.mark.parametrize(
    ("path", "cap"),
    [("/generate", limits.JSON_BYTES), ("/v1/prefixes", limits.MB), ("/v1/jobs/x/cancel", limits.JSON_BYTES)],
)
def test_a_declared_length_over_the_cap_is_413_at_once(client: TestClient, path: str, cap: int) -> None:
    reply = client.post(path, content=b"", headers={"content-length": str(2 * cap)})
    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == "payload_too_large"
    assert "x-request-id" in reply.headers


@pytest.mark.parametrize("path", ["/generate", "/v1/prefixes"])
def test_received_bytes_are_counted(client: TestClient, path: str) -> None:
    headers = {"content-type": "multipart/form-data; boundary=b" if "prefixes" in path else "application/json"}
    reply = client.post(path, content=chunks(limits.JSON_BYTES), headers=headers)
    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == "payload_too_large"


def test_training_data_may_be_larger_than_other_json(client: TestClient) -> None:
    body = {"examples": [{"prompt": "p" * 1000, "completion": "c"}] * 5000}
    assert client.post("/v1/prefixes/x/train", json=body).status_code == 202
    reply = client.post("/v1/prefixes/x/train", content=b"", headers={"content-length": str(65 * limits.MB)})
    assert reply.status_code == 413


@pytest.mark.anyio
async def test_a_body_that_stops_on_its_way_is_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SILENCE_SECONDS", 0.05)
    pieces = [{"type": "http.request", "body": b"{", "more_body": True}]

    async def receive() -> Message:
        if pieces:
            return pieces.pop()
        await asyncio.sleep(10)
        raise AssertionError("nobody waits so long")

    counted = limits._counting(receive, limits.MB)
    assert (await counted())["body"] == b"{"
    with pytest.raises(RequestTimeout, match=r"did not come within 0\.05 seconds") as caught:
        await counted()
    reply = errors.response(caught.value)
    assert (reply.status_code, reply.headers["connection"]) == (408, "close")


@pytest.mark.anyio
async def test_whoever_has_sent_all_may_wait_as_long_as_the_answer_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SILENCE_SECONDS", 0.05)
    pieces = [{"type": "http.disconnect"}, {"type": "http.request", "body": b"{}"}]

    async def receive() -> Message:
        if len(pieces) == 1:
            await asyncio.sleep(0.2)
        return pieces.pop()

    counted = limits._counting(receive, limits.MB)
    assert [(await counted())["type"] for _ in range(2)] == ["http.request", "http.disconnect"]
