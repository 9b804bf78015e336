from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from server.api import limits
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
