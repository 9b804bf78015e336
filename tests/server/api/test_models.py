import dataclasses

import pytest
from starlette.testclient import TestClient

from prefix_store.model.frozen import FrozenModel
from prefix_store.store import Store
from server.api import models
from tests.server import artefacts
from tests.server.api.test_auth import key
from tests.server.api.test_generate import publish
from tests.server.conftest import Serve


def names(client: TestClient, **headers: str) -> list[str]:
    reply = client.get("/v1/models", headers=headers).json()
    assert reply["object"] == "list"
    return [model["id"] for model in reply["data"]]


def test_the_base_model_and_every_prefix_are_models(
    client: TestClient, store: Store, frozen: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "PAGE", 2)
    assert names(client) == ["tiny-llama"]
    for name in ("c", "a", "e", "b", "d"):
        publish(store, frozen, name)
    assert names(client) == ["tiny-llama", "a", "b", "c", "d", "e"]
    base, first, *_ = client.get("/v1/models").json()["data"]
    assert (base["max_model_len"], first["max_model_len"], first["parent"]) == (512, 508, "tiny-llama")
    for model in (base, first):
        assert model["object"] == "model"
        assert isinstance(model["created"], int)
        assert isinstance(model["owned_by"], str)


@pytest.mark.parametrize(
    ("path", "version"),
    [("support", 2), ("support@1", 1), ("support%401", 1), ("default/support", 2), ("default%2Fsupport%402", 2)],
)
def test_a_prefix_goes_by_any_reference_to_it(
    client: TestClient, store: Store, frozen: FrozenModel, path: str, version: int
) -> None:
    publish(store, frozen)
    publish(store, frozen, template="{prompt}!")
    found = client.get(f"/v1/models/{path}").json()
    assert found["version"] == version
    assert found["id"] == path.replace("%2F", "/").replace("%40", "@")
    assert found["digest"] == client.get(f"/v1/prefixes/support@{version}").json()["digest"]


def test_one_version_or_all_of_a_name_are_deleted(client: TestClient, store: Store, frozen: FrozenModel) -> None:
    for template in ("{prompt}!", "{prompt}?", "{prompt}"):
        publish(store, frozen, template=template)
    assert client.delete("/v1/models/support%403").json() == {"id": "support@3", "object": "model", "deleted": True}
    assert client.get("/v1/models/support").json()["version"] == 2
    assert client.delete("/v1/models/support").status_code == 200
    assert names(client) == ["tiny-llama"]
    for method in ("GET", "DELETE"):
        reply = client.request(method, "/v1/models/support")
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")


def test_the_base_model_stays(client: TestClient) -> None:
    reply = client.delete("/v1/models/tiny-llama")
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_request")
    assert reply.json()["error"]["message"] == "the base model cannot be deleted; prefixes can"
    assert client.get("/v1/models/tiny-llama").json()["id"] == "tiny-llama"


def test_a_key_without_the_scope_is_told_so_of_the_base_model_too(client: TestClient, store: Store) -> None:
    reply = client.delete("/v1/models/tiny-llama", headers=key(store, "generate"))
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "insufficient_scope")
    assert client.delete("/v1/models/tiny-llama", headers=key(store, "prefix:write")).status_code == 400


def test_where_a_prefix_is_required_the_base_is_no_model(serve: Serve, store: Store, frozen: FrozenModel) -> None:
    publish(store, frozen)
    client = serve(require_prefix=True)
    assert names(client) == ["support"]
    assert client.get("/v1/models/tiny-llama").status_code == 400


def test_a_prefix_made_for_another_base_model_is_none_of_this_servers(
    client: TestClient, store: Store, frozen: FrozenModel
) -> None:
    publish(store, frozen, "fits")
    publish(store, dataclasses.replace(frozen, digest="0" * 64), "elsewhere")
    assert names(client) == ["tiny-llama", "fits"]
    reply = client.post("/v1/completions", json={"model": "elsewhere", "prompt": "x"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "prefix_mismatch")
    assert reply.json()["error"]["param"] == "model"


def test_tenants_see_their_own_models(client: TestClient, store: Store, frozen: FrozenModel) -> None:
    acme, other = key(store, "generate", "prefix:write"), key(store, "generate", "prefix:write", tenant="other")
    manifest, tensors = artefacts.manifest(frozen, 4), {"self.kv": artefacts.random_kv(frozen, 4)}
    store.prefixes.save("acme", "mine", manifest, tensors)
    assert names(client, **acme) == ["tiny-llama", "mine"]
    assert names(client, **other) == ["tiny-llama"]
    for method, name in (("GET", "acme/mine"), ("DELETE", "acme/mine"), ("GET", "mine"), ("GET", "acme/none")):
        reply = client.request(method, f"/v1/models/{name}", headers=other)
        assert reply.json()["error"] == {
            "message": f"The model `{name}` does not exist or you do not have access to it.",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    assert client.delete("/v1/models/acme/mine", headers=acme).status_code == 200


def test_a_model_is_deleted_only_if_it_is_still_the_one_that_is_meant(
    client: TestClient, store: Store, frozen: FrozenModel
) -> None:
    publish(store, frozen)
    reply = client.delete("/v1/models/support", headers={"if-match": '"' + "0" * 64 + '"'})
    assert (reply.status_code, reply.json()["error"]["code"]) == (412, "precondition_failed")
    assert client.delete("/v1/models/support", headers={"if-match": "*"}).status_code == 200
