from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from prefix_store.model.frozen import FrozenModel
from prefix_store.store import Store
from server.api import auth
from tests.server import artefacts
from tests.server.conftest import Serve

BODY = {"prompt": "x"}


def key(store: Store, *scopes: str, tenant: str = "acme") -> dict[str, str]:
    presented, _ = store.keys.create(tenant, scopes)
    return {"authorization": f"Bearer {presented}"}


def routes(found: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """Every method and path, however the framework nests the routers."""
    for route in found:
        if hasattr(route, "original_router"):
            yield from routes(route.original_router.routes)
        elif hasattr(route, "routes"):
            yield from routes(route.routes)
        else:
            yield from ((method, route.path) for method in route.methods if method != "HEAD")


def test_every_route_asks_for_a_key_unless_it_is_on_the_open_list(client: TestClient, store: Store) -> None:
    key(store, "admin")
    found = list(routes(client.app.routes))
    assert ("POST", "/generate") in found
    assert len(found) > 10
    for method, path in found:
        status = client.request(method, path.replace("{", "").replace("}", "").replace(":path", "")).status_code
        assert (status == 401) == (path not in auth.OPEN), f"{method} {path} answered {status}"


def test_every_route_that_is_not_open_names_its_scope(client: TestClient) -> None:
    closed = {route for route in routes(client.app.routes) if route[1] not in auth.OPEN}
    assert closed == set(auth.SCOPES)


def test_without_any_key_on_loopback_everyone_is_the_one_tenant(client: TestClient) -> None:
    assert client.post("/generate", json=BODY).status_code == 200
    assert client.get("/metrics").status_code == 200


def test_without_any_key_elsewhere_nobody_comes_in(serve: Serve) -> None:
    client = serve(is_loopback=False)
    assert client.post("/generate", json=BODY).status_code == 401
    assert client.get("/healthz").status_code == 200


def test_the_first_key_closes_an_open_server_for_good(client: TestClient, store: Store) -> None:
    assert client.post("/generate", json=BODY).status_code == 200
    _, made = store.keys.create("acme", ["generate"])
    assert client.post("/generate", json=BODY).status_code == 401
    store.keys.remove(made.id)
    assert client.post("/generate", json=BODY).status_code == 401


def test_both_headers_carry_a_key(client: TestClient, store: Store) -> None:
    bearer = key(store, "generate")
    assert client.post("/generate", json=BODY, headers=bearer).status_code == 200
    presented = bearer["authorization"].removeprefix("Bearer ")
    assert client.post("/generate", json=BODY, headers={"x-api-key": presented}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Bearer nonsense"},
        {"authorization": "Basic dXNlcjpwYXNz"},
        {"authorization": f"Bearer afx_{'a' * 8}_{'b' * 43}"},
        {"x-api-key": "afx_" + "é" * 300},
    ],
)
def test_anything_else_is_401_in_our_shape(client: TestClient, store: Store, headers: dict[str, str]) -> None:
    key(store, "admin")
    raw = {name: value.encode() for name, value in headers.items()}
    reply = client.post("/generate", json=BODY, headers=raw)
    assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
    assert reply.json()["error"]["code"] == "invalid_api_key"


def test_a_key_does_only_what_its_scopes_allow(client: TestClient, store: Store) -> None:
    reader, admin = key(store, "prefix:read"), key(store, "admin")
    assert client.get("/v1/prefixes", headers=reader).status_code == 200
    for method, path in [("POST", "/generate"), ("DELETE", "/v1/prefixes/x"), ("GET", "/v1/jobs"), ("GET", "/metrics")]:
        reply = client.request(method, path, headers=reader)
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "insufficient_scope")
    assert client.get("/metrics", headers=admin).status_code == 200


def test_a_key_for_metrics_sees_nothing_else(client: TestClient, store: Store) -> None:
    scraper = key(store, "metrics")
    assert client.get("/metrics", headers=scraper).status_code == 200
    for method, path in auth.SCOPES:
        if path != "/metrics":
            url = path.replace("{", "").replace("}", "").replace(":path", "")
            assert client.request(method, url, headers=scraper).status_code == 403, f"{method} {path}"


def test_tenants_see_their_own_and_nothing_of_others(client: TestClient, store: Store, frozen: FrozenModel) -> None:
    acme, other = key(store, "admin"), key(store, "admin", tenant="other")
    file = {"file": ("f", artefacts.native(frozen))}
    assert client.post("/v1/prefixes", data={"id": "support"}, files=file, headers=acme).status_code == 201
    job = client.post(
        "/v1/prefixes/x/train", json={"examples": [{"prompt": "a", "completion": "b"}]}, headers=acme
    ).json()["job"]["id"]
    assert len(client.get("/v1/prefixes", headers=acme).json()["data"]) == 1
    assert client.get("/v1/prefixes", headers=other).json()["data"] == []
    assert client.get("/v1/jobs", headers=other).json()["data"] == []
    for method, path in [
        ("GET", "/v1/prefixes/{}"),
        ("DELETE", "/v1/prefixes/{}"),
        ("GET", "/v1/prefixes/{}/export"),
        ("GET", "/v1/prefixes/acme/{}"),
        ("GET", "/v1/jobs/{}"),
        ("GET", "/v1/jobs/{}/events"),
        ("POST", "/v1/jobs/{}/cancel"),
    ]:
        real, none = (job, "ftjob-none") if "jobs" in path else ("support", "nothing")
        foreign, unknown = (client.request(method, path.format(name), headers=other) for name in (real, none))
        assert foreign.status_code == unknown.status_code == 404
        assert foreign.text.replace(real, none) == unknown.text
    assert client.get("/v1/prefixes/support", headers=acme).status_code == 200


def test_nothing_is_read_of_a_body_before_the_key_is_known(client: TestClient, store: Store) -> None:
    key(store, "admin")
    reply = client.post("/v1/prefixes", content=b"no form at all")
    assert reply.status_code == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "localhost:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "127.0.0.1"}, 200),
        ({"host": "localhost:8000", "origin": "http://localhost:8000"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "evil.example:x"}, 403),
        ({"host": "localhost@evil.example"}, 403),
        ({"host": "[::1"}, 403),
        ({"host": ""}, 403),
        ({"origin": "http://[::1"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:9000"}, 403),
    ],
)
def test_an_open_server_answers_to_this_machine_s_names_alone(
    client: TestClient, headers: dict[str, str], status: int
) -> None:
    assert client.get("/v1/model", headers=headers).status_code == status
