from starlette.testclient import TestClient

from prefix_store.geometry import ModelGeometry
from prefix_store.model.frozen import FrozenModel
from prefix_store.store import Store


def test_the_model_tells_what_a_prefix_must_match(client: TestClient, frozen: FrozenModel) -> None:
    told = client.get("/v1/model").json()
    assert (told["id"], told["object"]) == ("tiny-llama", "model")
    assert ModelGeometry.from_json(told["geometry"]) == frozen.geometry
    assert (told["base_digest"], told["context_length"]) == (frozen.digest, 512)


def test_a_key_that_reads_prefixes_may_ask(client: TestClient, store: Store) -> None:
    statuses = {}
    for scope in ("prefix:read", "generate"):
        presented, _ = store.keys.create("acme", [scope])
        statuses[scope] = client.get("/v1/model", headers={"x-api-key": presented}).status_code
    assert statuses == {"prefix:read": 200, "generate": 403}
