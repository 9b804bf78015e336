"""GET /v1/prefixes/{ref}/inspect, beside an engine that has taken the model over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from prefix_store import codec
from prefix_store.model import apply, attended, stored
from prefix_store.store import Store
from server.api import aside
from server.api import inspect as route
from server.engine import int8_linear
from tests.models import random_kv, tiny_frozen
from tests.server import artefacts
from tests.server.live import Live, serving

TEXT = "The old man"


@pytest.fixture(autouse=True)
def in_no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside another test on the same core its low priority would make this ten times as long."""
    monkeypatch.setattr(aside, "LOW_PRIORITY", 0)


@pytest.fixture
def live(store: Store) -> Iterator[Live]:
    with serving(store) as running:
        yield running


def look(live: Live, name: str, *prompts: str) -> dict[str, Any]:
    reply = live.client.get(f"/v1/prefixes/{name}/inspect", params={"prompt": list(prompts)})
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def test_a_text_that_became_a_prefix_is_read_back(live):
    model = apply.attach(tiny_frozen("llama"))
    ids = model.tokenizer("A red fox").input_ids
    kv = apply.prefill_kv(model, ids)
    live.publish("fox", codec.encode(artefacts.manifest(model, len(ids)), {"self.kv": kv}))
    found = look(live, "fox", TEXT)
    assert (found["id"], found["version"], found["virtual_tokens"]) == ("fox", 1, len(ids))
    assert "".join(token["nearest"][0]["token"] for token in found["tokens"]) == "<s>A red fox"
    assert all(token["nearest"][0]["score"] > 0.9999 for token in found["tokens"])
    assert found["computed_with"] == "the float32 weights as they were loaded"


def test_attention_is_the_reference_s(live):
    model = apply.attach(tiny_frozen("llama"))
    live.publish("kv", artefacts.native(model, 5, seed=1))
    found = look(live, "kv", TEXT, "Two")
    texts = [model.tokenizer(text).input_ids for text in (TEXT, "Two")]
    kv, manifest = random_kv(model, 5, seed=1), artefacts.manifest(model, 5)
    expected = attended.shares(model, stored.rows_of(model, manifest, {}, kv), texts)
    for layer, row in enumerate(found["attention"]["layers"]):
        assert row["heads"] == pytest.approx(expected.mean[layer].tolist(), abs=1e-5)
        assert row["last_token_heads"] == pytest.approx(expected.last[layer].tolist(), abs=1e-5)
    assert found["attention"]["share"] == pytest.approx(float(expected.mean.mean()), abs=1e-5)
    assert [token["share"] for token in found["tokens"]] == pytest.approx(expected.by_token.tolist(), abs=1e-5)
    assert found["prompt_tokens"] == sum(map(len, texts))
    ranked = sorted(found["tokens"], key=lambda token: token["rank"])
    assert [token["rank"] for token in ranked] == [1, 2, 3, 4, 5]
    assert [token["importance"] for token in ranked] == sorted((t["importance"] for t in ranked), reverse=True)
    assert found["layers"][1]["key_norms"][2] == pytest.approx(float(kv[1, 0, :, 2].norm()), rel=1e-5)
    assert found["absent"] == {}


def test_what_a_method_does_not_have_is_said(live):
    model = tiny_frozen("llama")
    live.publish("plus", artefacts.memory(model))
    live.publish("soft", artefacts.prompt(model, 3))
    plus = look(live, "plus", TEXT)
    assert (plus["tokens"], plus["attention"]) == ([], None)
    assert len(plus["layers"][0]["memory_norms"]) == 6
    assert "softmax" in plus["absent"]["attention"]
    soft = look(live, "soft")
    assert [token["embedding_norm"] > 0 for token in soft["tokens"]] == [True] * 3
    assert (soft["attention"], soft["tokens"][0]["rank"], soft["prompt_tokens"]) == (None, None, 0)
    assert set(soft["absent"]) == {"attention", "importance"}
    assert set(look(live, "soft", "")["absent"]) == {"importance"}  # BOS alone


def test_a_template_goes_around_the_prompt(live):
    model = tiny_frozen("llama")
    live.publish("asked", artefacts.native(model, 3, template="Q: {prompt} A:"))
    assert look(live, "asked", "x")["prompt_tokens"] == len(model.tokenizer("Q: x A:").input_ids)


def test_the_engine_s_answers_stay_what_they_were(live):
    live.publish("kv", artefacts.native(tiny_frozen("llama"), 5))
    body = {"prefix_id": "kv", "prompt": TEXT, "max_tokens": 8, "temperature": 0, "logprobs": 2}
    before = live.client.post("/generate", json=body).json()
    look(live, "kv", TEXT)
    after = live.client.post("/generate", json=body).json()
    assert (after["text"], after["logprobs"]) == (before["text"], before["logprobs"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_fewer_bits(store, dtype):
    if dtype is torch.int8 and not int8_linear.works():
        pytest.skip("no exact int8 product on this machine")
    with serving(store, dtype=dtype) as live:
        live.publish("kv", artefacts.native(tiny_frozen("llama"), 5))
        found = look(live, "kv", TEXT)
    assert 0 < found["attention"]["share"] < 1
    assert ("int8" in found["computed_with"]) == (dtype is torch.int8)


def test_more_text_than_is_read_is_refused(live, monkeypatch):
    live.publish("kv", artefacts.native(tiny_frozen("llama"), 5))
    monkeypatch.setattr(route, "MOST_TOKENS", 10)
    reply = live.client.get("/v1/prefixes/kv/inspect", params={"prompt": "far too long a text"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert "at most 10 tokens" in reply.json()["error"]["message"]
    monkeypatch.setattr(route, "MOST_TOKENS", 10_000)
    reply = live.client.get("/v1/prefixes/kv/inspect", params={"prompt": "x" * 600})
    assert "at most 507 tokens" in reply.json()["error"]["message"]


def test_what_is_not_there_is_404(client: TestClient) -> None:
    reply = client.get("/v1/prefixes/nobody/inspect")
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "prefix_not_found")


def test_scopes(client: TestClient, store: Store) -> None:
    reader, _ = store.keys.create("acme", ["prefix:read"])
    writer, _ = store.keys.create("acme", ["generate"])
    for method, path, right, wrong in [
        ("GET", "inspect", reader, writer),
        ("POST", "verify", writer, reader),
    ]:
        replies = [
            client.request(method, f"/v1/prefixes/x/{path}", headers={"x-api-key": key}) for key in (right, wrong)
        ]
        assert [reply.status_code for reply in replies] == [404, 403]
