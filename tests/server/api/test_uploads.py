import base64
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from httpx import Response
from starlette.testclient import TestClient

from prefix_store import codec
from prefix_store.model.frozen import FrozenModel
from prefix_store.store import Store
from server.api import limits, receiving
from server.api.receiving import Received
from tests.server import artefacts
from tests.server.conftest import Serve

PATH = "/v1/prefixes/support/content"


def put(client: TestClient, file: Any, headers: dict[str, str] | None = None, **query: Any) -> Response:
    return client.put(PATH, content=file, headers=headers or {}, params=query)


def post(client: TestClient, file: bytes, headers: dict[str, str] | None = None, **fields: str) -> Response:
    return client.post("/v1/prefixes", data={"id": "support", **fields}, files={"file": ("f", file)}, headers=headers)


def code(reply: Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


def etag(data: bytes) -> str:
    return f'"{codec.digest_of(data)}"'


def left_over(store: Store) -> list[Path]:
    return list((Path(store.blobs.root) / "tmp").iterdir())


# the bare file


def test_a_bare_file_is_kept_byte_for_byte(client: TestClient, frozen: FrozenModel, store: Store) -> None:
    data = artefacts.native(frozen)
    reply = put(client, data)
    assert reply.status_code == 201
    assert reply.headers["etag"] == etag(data)
    assert client.get("/v1/prefixes/support/export").content == data
    assert client.get("/v1/prefixes/support").json() == reply.json()
    assert left_over(store) == []


def test_it_may_be_an_adapter_s_weights(client: TestClient, frozen: FrozenModel) -> None:
    reply = put(client, artefacts.adapter(frozen)["adapter_model.safetensors"])
    assert (reply.status_code, reply.json()["base_checked"]) == (201, False)


def test_it_may_come_in_chunks_of_any_length(
    client: TestClient, frozen: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiving, "PIECE", 100)
    data = artefacts.native(frozen)
    chunks = (data[start : start + 37] for start in range(0, len(data), 37))
    assert put(client, chunks).json()["digest"] == codec.digest_of(data)


def test_it_lies_beside_the_store_while_it_comes_and_nowhere_afterwards(
    client: TestClient, frozen: FrozenModel, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []
    finish = Received.finish

    async def finished(received: Received) -> None:
        await finish(received)
        seen.extend(left_over(store))

    monkeypatch.setattr(Received, "finish", finished)
    for send in (put, post):
        assert send(client, artefacts.native(frozen)).status_code == 201
        assert send(client, b"nothing sound").status_code == 400
    assert len(seen) == 4
    assert left_over(store) == []


def test_a_full_disk_is_said(client: TestClient, frozen: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    reply = put(client, artefacts.native(frozen))
    assert code(reply) == (503, "store_unavailable")
    assert "No space left" in reply.json()["error"]["message"]


# how large it may be


def megabytes(count: int) -> Iterator[bytes]:
    """A body that declares no length."""
    return (b"\0" * limits.MB for _ in range(count))


def test_what_is_too_large_is_413_declared_or_not(serve: Serve, store: Store) -> None:
    client = serve(max_upload_mb=1)
    before = left_over(store)
    assert code(put(client, b"", {"content-length": str(limits.MB + 1)})) == (413, "payload_too_large")
    assert code(put(client, megabytes(2))) == (413, "payload_too_large")
    reply = client.put(PATH, content=megabytes(1))
    assert code(reply) == (400, "invalid_prefix")  # just within the cap, and then looked at
    assert left_over(store) == before == []
    assert 'antefix_upload_rejected_total{code="payload_too_large"} 1.0' in client.get("/metrics").text
    for refused, count in (("invalid_prefix", 1), ("payload_too_large", 2)):
        assert f'antefix_requests_refused_total{{code="{refused}"}} {count}.0' in client.get("/metrics").text


# what is said about it


def test_notes_and_a_lifetime_come_along(client: TestClient, frozen: FrozenModel) -> None:
    data = artefacts.native(frozen)
    by_form = post(client, data, metadata='{"team": "sales", "ä": "ö"}', ttl_seconds="60").json()
    by_query = put(client, data, **{"metadata.team": "sales", "metadata.ä": "ö", "ttl_seconds": "60.0"}).json()
    for stored in (by_form, by_query):
        assert stored["metadata"] == {"team": "sales", "ä": "ö"}
        assert 55 < stored["expires_at"] - stored["created_at"] < 65
    assert (by_form["pinned"], by_form["current"], by_form["aliases"]) == (False, True, [])
    assert put(client, data).json()["expires_at"] is None


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"ttl_second": "60"}, "ttl_second"),
        ({"metadata.": "x"}, "metadata."),
        ({"metadata.a": ["1", "2"]}, "metadata.a"),
        ({"metadata.a": "x" * 513}, "metadata"),
        ({"ttl_seconds": "-1"}, "ttl_seconds"),
        ({"ttl_seconds": "inf"}, "ttl_seconds"),
        ({"ttl_seconds": ""}, "ttl_seconds"),
    ],
)
def test_a_wrong_parameter_is_named(client: TestClient, frozen: FrozenModel, query: dict[str, Any], param: str) -> None:
    reply = put(client, artefacts.native(frozen), **query)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("send", [put, post])
def test_the_file_s_digest_is_compared_with_what_is_said(client: TestClient, frozen: FrozenModel, send: Any) -> None:
    data = artefacts.native(frozen)
    digest = codec.digest_of(data)
    assert send(client, data, {"x-content-sha256": digest.upper()}).status_code == 201
    reply = send(client, data, {"x-content-sha256": "0" * 64})
    assert code(reply) == (400, "invalid_request")
    assert digest in reply.json()["error"]["message"]
    assert send(client, data, {"x-content-sha256": "short"}).json()["error"]["param"] == "x-content-sha256"


def test_content_digest_is_of_the_whole_body(client: TestClient, frozen: FrozenModel) -> None:
    def said(body: bytes) -> str:
        return f"sha-512=:AAAA:, sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"

    data = artefacts.native(frozen)
    assert put(client, data, {"content-digest": said(data)}).status_code == 201
    form = client.build_request("POST", "/v1/prefixes", data={"id": "support"}, files={"file": ("f", data)})
    whole = form.read()
    assert client.send(_with(form, said(whole))).status_code == 201
    assert client.send(_with(form, said(data))).status_code == 400
    for wrong in (said(b"other"), "sha-512=:AAAA:", "sha-256=:%%:", "sha-256=:A:", "md5"):
        assert code(put(client, data, {"content-digest": wrong})) == (400, "invalid_request"), wrong


def _with(request: Any, content_digest: str) -> Any:
    request.headers["content-digest"] = content_digest
    return request


# on what condition


@pytest.mark.parametrize("send", [put, post])
def test_if_match_is_of_the_current_version(client: TestClient, frozen: FrozenModel, send: Any) -> None:
    first, second, third = (artefacts.native(frozen, seed=seed) for seed in range(3))
    assert code(send(client, first, {"if-match": "*"})) == (412, "precondition_failed")
    assert send(client, first, {"if-none-match": "*"}).status_code == 201
    assert code(send(client, second, {"if-none-match": "*"})) == (412, "precondition_failed")
    assert send(client, second, {"if-match": etag(first)}).status_code == 201
    assert code(send(client, third, {"if-match": etag(first)})) == (412, "precondition_failed")
    assert code(send(client, third, {"if-match": '"latest"'})) == (412, "precondition_failed")
    assert send(client, third, {"if-match": "*"}).json()["version"] == 3


@pytest.mark.parametrize(
    "headers",
    [{"if-match": '"a", "b"'}, {"if-none-match": '"a"'}, {"if-match": "*", "if-none-match": "*"}],
)
def test_other_conditions_are_400(client: TestClient, frozen: FrozenModel, headers: dict[str, str]) -> None:
    assert code(put(client, artefacts.native(frozen), headers)) == (400, "invalid_request")


# what a tenant may have


def test_a_quota_is_403_and_nothing_is_kept(client: TestClient, frozen: FrozenModel, store: Store) -> None:
    data = artefacts.native(frozen)
    store.tenants.create("default")
    store.tenants.set_quotas("default", {"prefixes": 1, "bytes": 2 * len(data)})
    assert put(client, data).status_code == 201
    other = client.put("/v1/prefixes/other/content", content=data)
    assert code(other) == (403, "quota_exceeded")
    assert "may have 1 prefixes" in other.json()["error"]["message"]
    assert put(client, artefacts.native(frozen, seed=1)).status_code == 201
    assert put(client, artefacts.native(frozen, seed=2)).json()["error"]["param"] == "bytes"
    assert [item["version"] for item in client.get("/v1/prefixes").json()["data"]] == [2]


def test_every_change_is_audited(client: TestClient, frozen: FrozenModel, store: Store) -> None:
    presented, key = store.keys.create("acme", ["prefix:write"])
    headers = {"authorization": f"Bearer {presented}"}
    version = put(client, artefacts.native(frozen), headers).json()
    client.patch("/v1/prefixes/support", json={"pinned": True}, headers=headers)
    found = [entry for entry in store.audit.entries(tenant="acme") if entry.by == f"key {key.id}"]
    assert [(entry.action, entry.target, entry.digest) for entry in found] == [
        ("prefix.publish", "support@1", version["digest"]),
        ("prefix.edit", "support@1", version["digest"]),
    ]
