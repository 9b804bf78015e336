import inspect

import pytest
from starlette.testclient import TestClient

from prefix_store import errors as store_errors
from prefix_store.errors import AntefixError
from prefix_store.store import Store
from server.api import errors

CLASSES = [found for _, found in inspect.getmembers(store_errors, inspect.isclass) if issubclass(found, AntefixError)]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_has_a_status_and_our_shape(kind: type[AntefixError]) -> None:
    reply = errors.response(kind("what happened", param="field"))
    assert 400 <= reply.status_code < 600
    found = errors.body(kind("what happened", param="field"))["error"]
    assert (found["message"], found["param"], found["code"]) == ("what happened", "field", kind.code)
    assert found["type"].endswith("_error")


def test_the_statuses_that_clients_rely_on() -> None:
    expected = {
        store_errors.PrefixMismatch: 400,
        store_errors.ContextLengthExceeded: 400,
        store_errors.Unauthorized: 401,
        store_errors.Forbidden: 403,
        store_errors.JobNotFound: 404,
        store_errors.Conflict: 409,
        store_errors.PayloadTooLarge: 413,
        store_errors.Overloaded: 429,
        store_errors.StoreCorrupt: 500,
        store_errors.StoreUnavailable: 503,
    }
    assert {kind: errors.response(kind("x")).status_code for kind in expected} == expected
    assert errors.response(store_errors.Conflict("x")).headers["x-should-retry"] == "false"
    assert errors.response(store_errors.StoreUnavailable("x")).headers["retry-after"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "route_not_found"),
        ("GET", "/generate", 405, "method_not_allowed"),
        ("GET", "/docs", 404, "route_not_found"),
        ("GET", "/openapi.yaml", 404, "route_not_found"),
        ("GET", "/v1/prefixes?limit=0", 400, "invalid_request"),
        ("GET", "/v1/prefixes?limit=x", 400, "invalid_request"),
    ],
)
def test_the_framework_s_own_errors_have_our_shape(
    client: TestClient, method: str, path: str, status: int, code: str
) -> None:
    reply = client.request(method, path)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_input_is_never_echoed_at_length(client: TestClient) -> None:
    long = "x" * 5000
    for reply in (
        client.post("/generate", json={"prompt": "p", long: 1}),
        client.post("/generate", json={"prompt": "p", "prefix_id": long}),
        client.get(f"/v1/prefixes/{long}"),
        client.get(f"/v1/jobs/{long}"),
        client.get(f"/v1/prefixes?limit={long}"),
    ):
        assert 400 <= reply.status_code < 500
        assert "x" * 81 not in reply.text


def test_a_bug_is_500_without_a_traceback_but_with_an_id(
    client: TestClient, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(store.prefixes, "page", broken)
    reply = client.get("/v1/prefixes", headers={"x-request-id": "mine"})
    assert (reply.status_code, reply.headers["x-request-id"]) == (500, "mine")
    assert reply.json()["error"]["code"] == "internal_error"
    assert "secret" not in reply.text
    assert "Traceback" not in reply.text
