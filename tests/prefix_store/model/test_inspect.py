"""What an inspection holds for each method, and what its numbers are made of."""

from __future__ import annotations

import pytest
import torch

from prefix_store.errors import ModelUnsupported
from prefix_store.model import apply, inspect, stored
from prefix_store.model.frozen import FrozenModel
from prefix_store.prefix import Method, PrefixManifest, Window
from tests.models import random_kv, random_memory, tiny_frozen

TEXTS = [(40, 41, 42, 43), (7, 9)]


@pytest.fixture(scope="module")
def model() -> FrozenModel:
    return apply.attach(tiny_frozen("llama"))


def made(model: FrozenModel, method: Method, length: int) -> PrefixManifest:
    feature_map = "elu" if method is Method.PREFIX_PLUS else None
    return PrefixManifest(method, model.geometry, length, length, window=Window.ALWAYS, feature_map=feature_map)


@pytest.mark.parametrize("method", [Method.PREFIX, Method.TEXT])
def test_keys_and_values(model, method):
    kv = random_kv(model, 3)
    found = inspect.inspect(model, made(model, method, 3), {"self.kv": kv}, TEXTS)
    assert found.norms.keys[1, 2] == pytest.approx(float(kv[1, 0, :, 2].norm()))
    assert found.norms.values[2, 0] == pytest.approx(float(kv[2, 1, :, 0].norm()))
    assert (found.norms.embeds, found.norms.memory) == (None, None)
    assert found.words.ids.shape == (3, inspect.WORDS)
    assert found.shares.mean.shape == (3, 6)
    assert found.importance.rises.shape == (3,)
    assert found.importance.tokens == 4


def test_a_soft_prompt(model):
    embeds = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    found = inspect.inspect(model, made(model, Method.PROMPT, 3), {"embeds": embeds}, TEXTS)
    assert found.norms.embeds.tolist() == pytest.approx(embeds.norm(dim=1).tolist())
    assert found.norms.keys.shape == (3, 3)
    assert found.shares.by_token.shape == (3,)


def test_a_memory(model):
    memory = random_memory(model)
    found = inspect.inspect(model, made(model, Method.PREFIX_PLUS, 0), {"memory": memory}, TEXTS)
    assert found.norms.memory[2, 5] == pytest.approx(float(memory[2, 5].norm()))
    assert (found.words, found.shares, found.importance) == (None, None, None)
    rows = stored.rows_of(model, made(model, Method.PREFIX_PLUS, 0), {"memory": memory}, random_kv(model, 0))
    ids = torch.tensor([[5, 6]])
    bare = apply.logits(model, ids, torch.ones_like(ids), None)
    assert (apply.logits(model, ids, torch.ones_like(ids), rows) - bare).abs().max() > 0.1


def test_without_a_text_nothing_is_measured_on_one(model):
    found = inspect.inspect(model, made(model, Method.PREFIX, 3), {"self.kv": random_kv(model, 3)})
    assert (found.shares, found.importance) == (None, None)
    one = inspect.inspect(model, made(model, Method.PREFIX, 3), {"self.kv": random_kv(model, 3)}, [(5,)])
    assert (one.shares is None, one.importance) == (False, None)


def test_a_virtual_token_that_says_more_matters_more(model):
    quiet = random_kv(model, 3)
    loud = quiet.clone()
    loud[:, 1, :, 1] *= 20
    rises = [inspect.importance(model, made(model, Method.PREFIX, 3), kv, TEXTS).rises for kv in (quiet, loud)]
    assert rises[1][1].abs() > 3 * rises[0][1].abs()


def test_texts_are_cut_to_what_may_be_run(model, monkeypatch):
    monkeypatch.setattr(inspect, "MOST_RUN", 24)  # 4 runs of 6 tokens, for two texts
    manifest = made(model, Method.PREFIX, 3)
    assert inspect.importance(model, manifest, random_kv(model, 3), TEXTS).tokens == 2 + 1
    monkeypatch.setattr(inspect, "MOST_RUN", 1)
    assert inspect.importance(model, manifest, random_kv(model, 3), TEXTS).tokens == 1 + 1


def test_a_prefix_beside_an_encoder_is_refused():
    model = tiny_frozen("bart")
    with pytest.raises(ModelUnsupported, match="encoder-decoder"):
        inspect.inspect(model, made(model, Method.PREFIX, 3), {"self.kv": random_kv(model, 3)}, TEXTS)
