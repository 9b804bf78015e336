from collections.abc import Callable
from typing import Any

import pytest
from httpx import Response
from starlette.testclient import TestClient

from prefix_store.model.frozen import FrozenModel
from prefix_store.store import Store
from tests.server import artefacts
from tests.server.fakes import FakeLoop

As = Callable[..., Response]


@pytest.fixture
def three(client: TestClient, frozen: FrozenModel) -> list[str]:
    """The digests of three versions of `support`."""
    return [
        client.put("/v1/prefixes/support/content", content=artefacts.native(frozen, seed=seed)).json()["digest"]
        for seed in range(3)
    ]


@pytest.fixture
def by(client: TestClient, store: Store) -> As:
    """Requests as a tenant with every scope."""
    keys: dict[str, str] = {}

    def request(tenant: str, method: str, path: str, **more: Any) -> Response:
        if tenant not in keys:
            keys[tenant], _ = store.keys.create(tenant, ["admin"])
        return client.request(method, path, headers={"authorization": f"Bearer {keys[tenant]}"}, **more)

    return request


def code(reply: Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


def test_versions_are_listed_in_order_and_in_pages(client: TestClient, three: list[str]) -> None:
    page = client.get("/v1/prefixes/support/versions", params={"limit": 2}).json()
    assert [(item["version"], item["digest"]) for item in page["data"]] == [(1, three[0]), (2, three[1])]
    assert page["has_more"]
    rest = client.get("/v1/prefixes/support/versions", params={"after": 2}).json()
    assert ([item["version"] for item in rest["data"]], rest["has_more"]) == ([3], False)
    assert [item["current"] for item in [*page["data"], *rest["data"]]] == [False, False, True]
    assert code(client.get("/v1/prefixes/support@1/versions")) == (400, "invalid_name")
    assert code(client.get("/v1/prefixes/nothing/versions")) == (404, "prefix_not_found")


def test_rollback_goes_back_by_one_or_to_any(client: TestClient, three: list[str]) -> None:
    def roll(**body: Any) -> Response:
        return client.post("/v1/prefixes/support/rollback", json=body)

    assert roll().json()["version"] == 2
    assert client.get("/v1/prefixes/support").json()["digest"] == three[1]
    assert roll(version=None).json()["version"] == 1
    assert code(roll()) == (409, "conflict")
    assert roll(version=3).headers["etag"] == f'"{three[2]}"'
    assert code(roll(version=4)) == (404, "prefix_not_found")
    assert code(roll(version=0)) == (400, "invalid_request")
    assert code(client.post("/v1/prefixes/nothing/rollback", json={})) == (404, "prefix_not_found")


def test_an_upload_after_a_rollback_is_a_new_version(client: TestClient, three: list[str], frozen: FrozenModel) -> None:
    client.post("/v1/prefixes/support/rollback", json={"version": 1})
    again = client.put("/v1/prefixes/support/content", content=artefacts.native(frozen, seed=0)).json()
    assert (again["version"], again["digest"], again["current"]) == (4, three[0], True)


def test_an_alias_is_a_name_for_a_version(client: TestClient, three: list[str], loop: FakeLoop) -> None:
    path = "/v1/prefixes/support/aliases/stable"
    assert client.put(path, json={"version": 1}).json()["aliases"] == ["stable"]
    assert client.get("/v1/prefixes/support@stable").json()["digest"] == three[0]
    asked = {"prompt": "x", "prefix_id": "support@stable"}
    assert client.post("/generate", json=asked).json()["prefix"]["digest"] == three[0]
    assert client.put(path, json={"version": 2}).json()["aliases"] == ["stable"]
    assert client.post("/generate", json=asked).json()["prefix"]["digest"] == three[1]
    assert code(client.delete("/v1/prefixes/support@2")) == (409, "conflict")
    assert client.delete(path).json() == {
        "id": "support", "object": "prefix.alias", "alias": "stable", "deleted": True
    }  # fmt: skip
    assert code(client.post("/generate", json=asked)) == (404, "prefix_not_found")
    assert code(client.delete(path)) == (404, "prefix_not_found")


@pytest.mark.parametrize("alias", ["3", "Stable", "a b", "x" * 65, "é"])
def test_an_alias_that_is_none_is_400(client: TestClient, three: list[str], alias: str) -> None:
    reply = client.put(f"/v1/prefixes/support/aliases/{alias}", json={"version": 1})
    assert code(reply) == (400, "invalid_name")


@pytest.mark.parametrize("body", [{}, {"version": "1"}, {"version": True}, {"version": 10**12}, {"verison": 1}])
def test_an_alias_needs_a_version(client: TestClient, three: list[str], body: dict[str, Any]) -> None:
    assert code(client.put("/v1/prefixes/support/aliases/a", json=body)) == (400, "invalid_request")


def test_what_may_change_of_a_version(client: TestClient, three: list[str]) -> None:
    def edit(**body: Any) -> Response:
        return client.patch("/v1/prefixes/support@2", json=body)

    shown = edit(metadata={"a": "1"}, pinned=True, ttl_seconds=60).json()
    assert (shown["version"], shown["metadata"], shown["pinned"], shown["digest"]) == (2, {"a": "1"}, True, three[1])
    assert shown["expires_at"] is not None
    assert edit(ttl_seconds=None).json()["expires_at"] is None
    assert edit(pinned=None).json()["metadata"] == {"a": "1"}  # null is absent
    assert code(client.delete("/v1/prefixes/support")) == (409, "conflict")
    assert edit(pinned=False).json()["pinned"] is False
    assert client.delete("/v1/prefixes/support@2").json()["versions"] == [2]
    for body in ({"metadata": {"a": 1}}, {"pinned": 1}, {"ttl_seconds": -1}, {"digest": "x"}):
        assert code(client.patch("/v1/prefixes/support", json=body)) == (400, "invalid_request")
    assert code(edit(pinned=True)) == (404, "prefix_not_found")


def test_what_has_expired_is_not_there(client: TestClient, three: list[str], store: Store) -> None:
    assert client.patch("/v1/prefixes/support@1", json={"ttl_seconds": 0.001}).status_code == 200
    assert code(client.get("/v1/prefixes/support@1")) == (404, "prefix_not_found")
    assert code(client.patch("/v1/prefixes/support@1", json={"ttl_seconds": None})) == (404, "prefix_not_found")
    assert code(client.put("/v1/prefixes/support/aliases/a", json={"version": 1})) == (404, "prefix_not_found")
    assert [item["version"] for item in client.get("/v1/prefixes/support/versions").json()["data"]] == [2, 3]


def test_a_name_whose_only_version_has_expired_is_new(client: TestClient, frozen: FrozenModel) -> None:
    data, path = artefacts.native(frozen), "/v1/prefixes/support/content"
    client.put(path, content=data, params={"ttl_seconds": "0.001"})
    assert code(client.put(path, content=data, headers={"if-match": "*"})) == (412, "precondition_failed")
    assert client.put(path, content=data, headers={"if-none-match": "*"}).json()["version"] == 2


def test_delete_may_be_of_the_version_that_the_caller_knows(client: TestClient, three: list[str]) -> None:
    stale = client.delete("/v1/prefixes/support", headers={"if-match": f'"{three[0]}"'})
    assert code(stale) == (412, "precondition_failed")
    assert client.delete("/v1/prefixes/support", headers={"if-match": f'"{three[2]}"'}).status_code == 200


def test_lists_are_filtered(client: TestClient, frozen: FrozenModel) -> None:
    for name, team in (("a", "x"), ("b", "y"), ("c", "x")):
        params = {"metadata.team": team, "metadata.kind": "k"}
        client.put(f"/v1/prefixes/{name}/content", content=artefacts.native(frozen), params=params)
    client.put("/v1/prefixes/d/content", content=artefacts.memory(frozen))

    def listed(**query: Any) -> list[str]:
        return [item["id"] for item in client.get("/v1/prefixes", params=query).json()["data"]]

    assert listed(**{"metadata.team": "x"}) == ["a", "c"]
    assert listed(**{"metadata.team": "x", "metadata.kind": "k", "after": "a"}) == ["c"]
    assert listed(**{"metadata.team": "x", "metadata.kind": "other"}) == []
    assert listed(method="prefix_plus") == ["d"]
    assert listed(method="prefix", limit=1, after="a") == ["b"]
    first = client.get("/v1/prefixes", params={"metadata.team": "x", "limit": 1}).json()
    assert first["has_more"]
    for wrong in ({"method": "lora"}, {"metod": "prefix"}, {"metadata.": "x"}, {"team": "x"}):
        assert code(client.get("/v1/prefixes", params=wrong)) == (400, "invalid_request")


# sharing


def test_a_shared_prefix_is_its_readers_by_its_full_name(by: As, frozen: FrozenModel) -> None:
    stored = by("acme", "PUT", "/v1/prefixes/support/content", content=artefacts.native(frozen)).json()
    by("acme", "PUT", "/v1/prefixes/support/aliases/stable", json={"version": 1})
    assert by("acme", "GET", "/v1/prefixes/support/sharing").json()["tenants"] == []
    reply = by("acme", "PUT", "/v1/prefixes/support/sharing", json={"tenants": ["reader", "acme"]})
    assert reply.json() == {"id": "support", "object": "prefix.sharing", "tenants": ["reader"]}
    asked = {"prompt": "x", "prefix_id": "acme/support@stable"}
    answered = by("reader", "POST", "/generate", json=asked).json()["prefix"]
    assert answered == {"tenant": "acme", "id": "support", "version": 1, "digest": stored["digest"]}
    shown = by("reader", "GET", "/v1/prefixes/acme/support").json()
    assert (shown["tenant"], shown["aliases"], shown["job_id"]) == ("acme", ["stable"], None)
    assert by("reader", "GET", "/v1/prefixes/acme/support@1/export").content == artefacts.native(frozen)
    assert len(by("reader", "GET", "/v1/prefixes/acme/support/versions").json()["data"]) == 1
    (listed,) = by("reader", "GET", "/v1/prefixes", params={"shared": True}).json()["data"]
    assert (listed["tenant"], listed["id"]) == ("acme", "support")
    assert by("reader", "GET", "/v1/prefixes").json()["data"] == []
    assert by("third", "GET", "/v1/prefixes", params={"shared": True}).json()["data"] == []
    assert code(by("third", "POST", "/generate", json=asked)) == (404, "prefix_not_found")


def test_what_is_shared_is_still_its_owner_s_to_change(by: As, frozen: FrozenModel) -> None:
    by("acme", "PUT", "/v1/prefixes/support/content", content=artefacts.native(frozen))
    by("acme", "PUT", "/v1/prefixes/support/sharing", json={"tenants": "all"})
    assert by("reader", "GET", "/v1/prefixes/acme/support").status_code == 200
    for ref in ("acme/support", "acme/support@1"):
        assert code(by("reader", "DELETE", f"/v1/prefixes/{ref}")) == (404, "prefix_not_found")
        assert code(by("reader", "PATCH", f"/v1/prefixes/{ref}", json={"pinned": True})) == (404, "prefix_not_found")
    assert by("acme", "GET", "/v1/prefixes/support/sharing").json()["tenants"] == "all"
    by("acme", "PUT", "/v1/prefixes/support/sharing", json={"tenants": []})
    assert code(by("reader", "GET", "/v1/prefixes/acme/support")) == (404, "prefix_not_found")


@pytest.mark.parametrize("tenants", ["some", ["No Name"], [3], None, ["a"] * 1001])
def test_sharing_is_with_tenants(by: As, frozen: FrozenModel, tenants: Any) -> None:
    by("acme", "PUT", "/v1/prefixes/support/content", content=artefacts.native(frozen))
    reply = by("acme", "PUT", "/v1/prefixes/support/sharing", json={"tenants": tenants})
    assert reply.status_code == 400


def test_shared_lists_come_in_pages_of_one_order(by: As, frozen: FrozenModel) -> None:
    """`a-b/x` is before `a/x`, as `-` is before `/`."""
    for owner, name, tenants in (
        ("a", "x", "all"),
        ("a-b", "x", ["reader"]),
        ("a", "y", ["reader"]),
        ("b", "x", "all"),
    ):
        by(owner, "PUT", f"/v1/prefixes/{name}/content", content=artefacts.native(frozen))
        by(owner, "PUT", f"/v1/prefixes/{name}/sharing", json={"tenants": tenants})
    seen, after = [], ""
    while True:
        page = by("reader", "GET", "/v1/prefixes", params={"shared": True, "limit": 1, "after": after}).json()
        seen += [after := f"{item['tenant']}/{item['id']}" for item in page["data"]]
        if not page["has_more"]:
            break
    assert seen == ["a-b/x", "a/x", "a/y", "b/x"]


@pytest.mark.parametrize("header", ["if-match", "if-none-match", "idempotency-key"])
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PATCH", "", {"pinned": True}),
        ("POST", "/rollback", {}),
        ("PUT", "/aliases/stable", {"version": 1}),
        ("PUT", "/sharing", {"tenants": "all"}),
    ],
)
def test_a_condition_that_is_not_heeded_is_refused(
    client: TestClient, three: list[str], method: str, path: str, body: dict[str, Any], header: str
) -> None:
    before = client.get("/v1/prefixes/support").json()
    reply = client.request(method, f"/v1/prefixes/support{path}", json=body, headers={header: "*"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, header)
    assert client.get("/v1/prefixes/support").json() == before
