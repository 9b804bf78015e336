import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from httpx import Response
from starlette.testclient import TestClient

from prefix_store.answers import CLAIM_SECONDS, KEPT_SECONDS
from prefix_store.model.frozen import FrozenModel
from prefix_store.prefix import PrefixRef
from prefix_store.store import Store
from server.api import uploads
from server.app import create_app
from server.engine.prefix_loader import PrefixLoader
from tests.prefix_store.samples import Clock
from tests.server import artefacts
from tests.server.fakes import FakeLoop

EXAMPLES = [{"prompt": "a", "completion": "b"}]


def put(client: TestClient, file: bytes, key: str = "k1", name: str = "support", **query: str) -> Response:
    headers = {"idempotency-key": key}
    return client.put(f"/v1/prefixes/{name}/content", content=file, headers=headers, params=query)


def train(client: TestClient, key: str, **options: Any) -> Response:
    body = {"examples": EXAMPLES, **options}
    return client.post("/v1/prefixes/sums/train", json=body, headers={"idempotency-key": key})


def code(reply: Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


def versions(client: TestClient, name: str = "support") -> int:
    return len(client.get(f"/v1/prefixes/{name}/versions").json()["data"])


def test_an_upload_that_comes_again_is_answered_again_and_done_once(client: TestClient, frozen: FrozenModel) -> None:
    data = artefacts.native(frozen)
    first = put(client, data)
    client.patch("/v1/prefixes/support", json={"metadata": {"since": "changed"}})
    again = put(client, data, '"k1"')  # a string by the draft is the same key
    assert (again.status_code, again.content, again.headers["etag"]) == (201, first.content, first.headers["etag"])
    assert ("idempotent-replayed" in first.headers, again.headers["idempotent-replayed"]) == (False, "true")
    assert versions(client) == 1
    assert put(client, data, "k2").json()["version"] == 2


def test_by_form_too(client: TestClient, frozen: FrozenModel) -> None:
    def post(metadata: str) -> Response:
        parts = {"id": "support", "metadata": metadata}
        files = {"file": ("f", artefacts.native(frozen))}
        return client.post("/v1/prefixes", data=parts, files=files, headers={"idempotency-key": "k"})

    assert post("{}").content == post("{}").content
    assert versions(client) == 1
    assert code(post('{"a": "b"}')) == (422, "idempotency_key_reused")


def test_a_job_that_is_asked_for_again_is_the_same(client: TestClient) -> None:
    first = train(client, "k", steps=3).json()["job"]
    assert train(client, "k", steps=3).json()["job"] == first
    assert len(client.get("/v1/jobs").json()["data"]) == 1
    assert train(client, "k2", steps=3).json()["job"]["id"] != first["id"]


def test_another_request_of_the_same_key_is_422(client: TestClient, frozen: FrozenModel) -> None:
    data = artefacts.native(frozen)
    put(client, data)
    for other in (
        put(client, artefacts.native(frozen, seed=1)),
        put(client, data, name="other"),
        put(client, data, ttl_seconds="60"),
        train(client, "k1"),
    ):
        assert code(other) == (422, "idempotency_key_reused")
    assert versions(client) == 1


def test_a_refused_request_may_come_again(client: TestClient, frozen: FrozenModel) -> None:
    assert put(client, b"nothing sound").status_code == 400
    assert put(client, artefacts.native(frozen)).status_code == 201
    assert train(client, "t", steps=0).status_code == 400
    assert train(client, "t", steps=1).status_code == 202


@pytest.mark.parametrize("key", ["", '""', "x" * 256, "a b", "ä"])
def test_a_key_that_is_none_is_400(client: TestClient, frozen: FrozenModel, key: str) -> None:
    headers = {b"idempotency-key": key.encode("latin-1")}
    reply = client.put("/v1/prefixes/support/content", content=artefacts.native(frozen), headers=headers)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "idempotency-key")


def test_one_that_is_still_being_answered_is_409_and_says_to_wait(
    client: TestClient, frozen: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, decode = threading.Event(), threading.Event(), uploads._decode

    def slow(*arguments: Any) -> Any:
        begun.set()
        go_on.wait(10)
        return decode(*arguments)

    monkeypatch.setattr(uploads, "_decode", slow)
    data = artefacts.native(frozen)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(put, client, data)
        begun.wait(10)
        second = put(client, data)
        go_on.set()
    assert code(second) == (409, "idempotency_key_in_use")
    assert second.headers["retry-after"] == "1"
    assert "x-should-retry" not in second.headers
    assert put(client, data).content == first.result().content
    assert versions(client) == 1


def test_every_tenant_has_keys_of_its_own(client: TestClient, frozen: FrozenModel, store: Store) -> None:
    made = []
    for tenant in ("acme", "other"):
        presented, _ = store.keys.create(tenant, ["prefix:write"])
        headers = {"authorization": f"Bearer {presented}", "idempotency-key": "k"}
        data = artefacts.native(frozen, seed=len(made))
        made.append(client.put("/v1/prefixes/support/content", content=data, headers=headers).status_code)
    assert made == [201, 201]


def test_what_was_claimed_and_never_answered_is_free_after_a_while(frozen: FrozenModel, tmp_path: Any) -> None:
    clock = Clock()
    store = Store.open(f"sqlite:///{tmp_path}/store.db", clock=clock)
    app = create_app(store, frozen, FakeLoop(lambda request: []), PrefixLoader(store.prefixes, frozen, 1))
    client = TestClient(app, base_url="http://127.0.0.1:8000")
    assert train(client, "k").status_code == 202
    clock.now += KEPT_SECONDS + 1
    assert train(client, "k", steps=9).status_code == 202  # after a day it is forgotten
    clock.now += KEPT_SECONDS + CLAIM_SECONDS
    store.collect()
    with store.backend.view() as view:
        assert view.scan("once/") == []
    assert not store.prefixes.ever_published("default", PrefixRef("default", "sums").name)
    store.close()
