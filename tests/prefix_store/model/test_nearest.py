"""A prefix made of a text and not trained names that text's words."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from prefix_store import codec
from prefix_store.model import apply, frozen, nearest
from prefix_store.model.frozen import FrozenModel
from tests.models import FAMILIES, tiny_frozen
from tests.parity.harness import sampled


def some_text(model: FrozenModel, length: int, seed: int) -> list[int]:
    """Any words of the vocabulary behind BOS, as training starts from."""
    draws = random.Random(seed)
    return [model.tokenizer.bos_token_id, *draws.choices(range(3, model.vocabulary_size), k=length - 1)]


def right(found: nearest.Words, ids: Sequence[int]) -> float:
    return float((found.ids[:, 0] == torch.tensor(ids)).float().mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_is_found_again_in_its_keys_and_values(family):
    model = apply.attach(tiny_frozen(family))
    ids = some_text(model, 24, seed=1)
    found = nearest.to_kv(model, apply.prefill_kv(model, ids), 3)
    assert right(found, ids) == 1.0
    assert found.scores[:, 0].min() > 0.9999
    assert found.ids.shape == (24, 3)
    assert (found.scores[:, 0] > found.scores[:, 1]).all()


def test_texts_are_found_again_on_the_bundled_model():
    model = apply.attach(frozen.load(frozen.BUNDLED))
    text = model.tokenizer("It was a dark night, and the old man told his son of the war in France.").input_ids
    for ids in (text[:16], some_text(model, 32, seed=2)):
        found = nearest.to_kv(model, apply.prefill_kv(model, ids), 5)
        assert right(found, ids) >= 0.95
    assert right(found, [3] * len(ids)) < 0.1


def test_words_are_looked_for_at_their_own_place():
    """Another text's keys and values are far from these words, and the words at another place are too."""
    model = apply.attach(tiny_frozen("gpt2"))
    ids = some_text(model, 12, seed=3)
    kv = apply.prefill_kv(model, ids)
    moved = nearest.to_kv(model, kv.roll(1, dims=3), 1)
    assert moved.scores[:, 0].max() < 0.999


def test_a_trained_prefix_is_near_but_not_equal():
    model = apply.attach(frozen.load(frozen.BUNDLED))
    _, tensors = codec.decode(frozen.BUNDLED.parent / "prefixes" / "plays.safetensors")
    found = nearest.to_kv(model, tensors["self.kv"], 1)
    assert ((found.scores[1:] > 0.1) & (found.scores[1:] < 0.999)).all()


@pytest.mark.parametrize("family", sampled(["gpt2", "llama", "gemma", "gemma3_text", "opt"]))
def test_a_soft_prompt_is_found_by_its_direction(family):
    model = tiny_frozen(family)
    ids = some_text(model, 20, seed=4)
    embeds = model.model.get_input_embeddings()(torch.tensor(ids)).detach()
    found = nearest.to_embeds(model, 3 * embeds, 5)
    assert right(found, ids) == 1.0
    assert found.scores[:, 0].min() > 0.9999
    assert right(nearest.to_embeds(model, -embeds, 5), ids) == 0.0


def test_the_vocabulary_is_read_in_pieces(monkeypatch):
    model = apply.attach(tiny_frozen("llama"))
    kv = apply.prefill_kv(model, some_text(model, 9, seed=5))
    whole = nearest.to_kv(model, kv, 4)
    monkeypatch.setattr(nearest, "CHUNK", 37)
    monkeypatch.setattr(nearest, "COPIED", 1)
    pieces = nearest.to_kv(model, kv, 4)
    assert torch.equal(whole.ids, pieces.ids)
    assert torch.allclose(whole.scores, pieces.scores, atol=1e-6)
