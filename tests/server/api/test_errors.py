import inspect

import pytest
from starlette.testclient import TestClient

from prefix_store import errors as store_errors
from prefix_store.errors import AntefixError
from prefix_store.store import Store
from server.api import errors, prefixes
from tests.server.api.test_auth import routes

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
    assert f'antefix_requests_refused_total{{code="{code}"}} 1.0' in client.get("/metrics").text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if status != 400:
        assert f"{method} {path}" in error["message"]
        assert ("/openapi.json" if status == 404 else "allowed: POST") in error["message"]


# What an address may be asked for, with its methods; HEAD goes with GET.
ALLOWED = {
    "/generate": {"POST"},
    "/v1/models": {"GET"},
    "/v1/models/a/b": {"GET", "DELETE"},
    "/v1/prefixes": {"GET", "POST"},
    "/v1/prefixes/a": {"GET", "PATCH", "DELETE"},
    "/v1/prefixes/acme/a@2": {"GET", "PATCH", "DELETE"},
    "/v1/prefixes/export": {"GET", "PATCH", "DELETE"},
    "/v1/prefixes/a/preload": {"POST"},
    "/v1/prefixes/acme/a/preload": {"POST"},
    "/v1/prefixes/a/release": {"POST"},
    "/v1/prefixes/a/verify": {"POST"},
    "/v1/prefixes/a/rollback": {"POST"},
    "/v1/prefixes/a/train": {"POST"},
    "/v1/prefixes/a/content": {"PUT"},
    "/v1/prefixes/a/export": {"GET"},
    "/v1/prefixes/a/inspect": {"GET"},
    "/v1/prefixes/a/versions": {"GET"},
    "/v1/prefixes/a/sharing": {"GET", "PUT"},
    "/v1/prefixes/a/aliases/stable": {"PUT", "DELETE"},
    "/v1/jobs/ftjob-1/cancel": {"POST"},
    "/v1/fine_tuning/jobs": {"GET", "POST"},
    "/v1/files/file-1": {"GET", "DELETE"},
}


@pytest.mark.parametrize("path", ALLOWED)
def test_another_method_than_an_address_takes_is_405_and_says_which_it_takes(client: TestClient, path: str) -> None:
    for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"} - ALLOWED[path]:
        reply = client.request(method, path)
        assert (reply.status_code, reply.json()["error"]["code"]) == (405, "method_not_allowed"), method
        expected = ALLOWED[path] | ({"HEAD"} if "GET" in ALLOWED[path] else set())
        assert set(reply.headers["allow"].split(", ")) == expected


def test_what_routes_have_below_a_prefix_is_no_reference(client: TestClient) -> None:
    """A route that is added there must be added to the pattern."""
    for _, path in routes(client.app.routes):
        head, _, below = path.partition("}/")
        if head.startswith("/v1/prefixes/{") and below:
            assert prefixes.BELOW.fullmatch(f"a/{below.replace('{alias}', 'stable')}"), path


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


def test_a_message_that_is_cut_says_so(client: TestClient, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    said, longest = [], errors.LONGEST

    def refused(*_: object) -> None:
        raise store_errors.InvalidRequest(said[-1])

    monkeypatch.setattr(store.prefixes, "page", refused)
    for length, told in ((longest, "x" * longest), (longest + 1, "x" * (longest - 1) + "…")):
        said.append("x" * length)
        assert client.get("/v1/prefixes").json()["error"]["message"] == told


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
