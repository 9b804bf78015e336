from __future__ import annotations

import math
from functools import cache

import pytest
import torch

from prefix_store.errors import ModelUnsupported
from prefix_store.geometry import Stack
from prefix_store.model import apply, both
from prefix_store.model.frozen import FrozenModel
from prefix_store.model.rows import StackRows
from tests.models import ENCODER_DECODERS, VOCABULARY, random_kvs, tiny_frozen, tiny_model
from tests.prefix_store.model.encoder_decoder import Kvs, alone, padded, rows_of

BART_LIKE = ("bart", "mbart", "pegasus", "marian")
CLOSE = 2e-5  # observed: at most 5e-6
FAR = 0.05  # what a wrong prefix or position does at the very least
SOURCES = [[5, 9, 30, 77, 12, 8], [40, 41, 42], [100, 3, 17, 200], [9, 9]]
LENGTHS = [4, 2, 5, 3]
STACKS = [tuple(Stack), (Stack.CROSS, Stack.ENCODER), (Stack.SELF,), ()]


@cache
def attached(family: str) -> FrozenModel:
    return apply.attach(tiny_frozen(family))


def targets(family: str) -> list[list[int]]:
    return [[attached(family).start_id, *ids] for ids in ([50, 60, 70, 80], [90], [21, 22], [11, 12, 13])]


def prefixes(family: str) -> list[Kvs]:
    """Rows with different stacks and lengths, and one with none."""
    chosen = enumerate(zip(LENGTHS, STACKS, strict=True))
    return [random_kvs(attached(family), length, seed, stacks) for seed, (length, stacks) in chosen]


def batch(family: str, kvs: list[Kvs], offsets: list[int], *, left: bool = False) -> list[torch.Tensor]:
    """Each row's logits, of all rows in one forward."""
    source, source_mask = padded(SOURCES, left=left)
    target, target_mask = padded(targets(family), left=left)
    with torch.no_grad():
        found = both.logits(attached(family), source, source_mask, target, target_mask, rows_of(kvs, offsets))
    return [row[mask.bool()] for row, mask in zip(found, target_mask, strict=True)]


def expected(family: str, kvs: list[Kvs], offsets: list[int]) -> list[torch.Tensor]:
    rows = zip(SOURCES, targets(family), kvs, offsets, strict=True)
    return [alone(family, source, target, kv, offset) for source, target, kv, offset in rows]


def largest(one: list[torch.Tensor], other: list[torch.Tensor]) -> list[float]:
    return [(a - b).abs().max().item() for a, b in zip(one, other, strict=True)]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_mixed_rows_are_what_transformers_gives_each_alone(family, left):
    kvs = prefixes(family)
    assert max(largest(batch(family, kvs, [0, 2, 5, 0], left=left), expected(family, kvs, [0, 2, 5, 0]))) < CLOSE


@pytest.mark.parametrize("stack", Stack)
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_a_stack_of_another_row_is_seen(family, stack):
    """The control of the test above: whatever is swapped between two rows moves both of them."""
    kvs = [random_kvs(attached(family), 4, seed) for seed in range(4)]
    right = expected(family, kvs, [0] * 4)
    assert max(largest(batch(family, kvs, [0] * 4), right)) < CLOSE
    swapped = [{**kvs[0], stack: kvs[1][stack]}, {**kvs[1], stack: kvs[0][stack]}, *kvs[2:]]
    found = largest(batch(family, swapped, [0] * 4), right)
    assert min(found[:2]) > FAR
    assert max(found[2:]) < CLOSE


@pytest.mark.parametrize("family", BART_LIKE)
def test_the_decoder_begins_where_its_row_says(family):
    kvs = [random_kvs(attached(family), 4, seed) for seed in range(4)]
    right = expected(family, kvs, [0, 4, 0, 4])
    assert max(largest(batch(family, kvs, [0, 4, 0, 4]), right)) < CLOSE
    assert min(largest(batch(family, kvs, [4, 0, 4, 0]), right)) > FAR


@pytest.mark.parametrize("family", ["t5", "t5_gated"])
def test_t5_knows_no_offset(family):
    kvs = [random_kvs(attached(family), 4, seed) for seed in range(4)]
    assert largest(batch(family, kvs, [4] * 4), batch(family, kvs, [0] * 4)) == [0] * 4


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_a_soft_prompt_is_embeddings_before_the_source(family):
    frozen, plain = attached(family), tiny_model(family)
    generator = torch.Generator().manual_seed(3)
    embeds = [torch.randn(length, frozen.geometry.hidden_size, generator=generator) for length in (3, 1)]
    parts = [StackRows.prompt(embeds[0], 1), StackRows.prompt(embeds[1], 2), StackRows.bare(1, frozen.device)]
    source, source_mask = padded(SOURCES)
    target, target_mask = padded(targets(family))
    scale = math.sqrt(plain.config.d_model) if getattr(plain.config, "scale_embedding", False) else 1
    with torch.no_grad():
        found = both.logits(frozen, source, source_mask, target, target_mask, StackRows.joined(parts))
        for row, own in enumerate([embeds[0], embeds[1], embeds[1], embeds[0][:0]]):
            words = plain.get_encoder().embed_tokens.weight[torch.tensor([SOURCES[row]])] * scale
            right = plain(
                inputs_embeds=torch.cat([own[None], words], dim=1),
                decoder_input_ids=torch.tensor([targets(family)[row]]),
            ).logits[0]
            assert (found[row, : len(right)] - right).abs().max() < CLOSE


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_text_read_first_is_the_encoders_own_prefix(family):
    """What `prefill` gives are the keys and values that the model makes of the text, in every stack and layer."""
    frozen, plain, ids = attached(family), tiny_model(family), [30, 31, 32, 33]
    found = both.prefill(frozen, ids)
    with torch.no_grad():
        target = torch.tensor([[frozen.start_id, *ids[:-1]]])
        caches = plain(input_ids=torch.tensor([ids]), decoder_input_ids=target, use_cache=True).past_key_values
    assert {stack: tuple(kv.shape) for stack, kv in found.items()} == {
        stack: (layers, 2, heads, 4, size)
        for stack, (layers, _, heads, size) in ((stack, frozen.geometry.kv_shape_of(stack)) for stack in Stack)
    }
    for stack, cached in ((Stack.SELF, caches.self_attention_cache), (Stack.CROSS, caches.cross_attention_cache)):
        right = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cached.layers])
        assert (found[stack] - right).abs().max() < CLOSE


def test_gradients_reach_every_number_of_every_stack():
    frozen = attached("bart")
    kvs = {stack: kv.requires_grad_() for stack, kv in random_kvs(frozen, 3, 0).items()}
    source, source_mask = padded(SOURCES)
    target, target_mask = padded(targets("bart"))
    found = both.logits(frozen, source, source_mask, target, target_mask, StackRows.shared(kvs, 4, 0))
    found.logsumexp(-1).sum().backward()
    for kv in kvs.values():
        assert kv.grad is not None
        assert bool((kv.grad.abs().amax(-1) > 0).all())


def test_no_hook_stays_behind():
    batch("bart", prefixes("bart"), [0] * 4)
    for module in attached("bart").model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


def test_a_model_in_which_a_stack_is_not_reached_is_refused(monkeypatch):
    frozen = tiny_frozen("bart")
    attention = frozen.model.get_submodule("model.encoder.layers.1.self_attn")
    monkeypatch.setattr(attention, "antefix_site", attention.antefix_site.__class__(Stack.ENCODER, 0))
    with pytest.raises(ModelUnsupported, match="encoder 1"):
        apply.attach(frozen)
    assert frozen.model.config._attn_implementation == "eager"


def test_an_unattached_model_is_refused():
    ids = torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(RuntimeError, match="attach"):
        both.logits(tiny_frozen("t5"), ids, ids + 1, ids % VOCABULARY, ids + 1, None)
