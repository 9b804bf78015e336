from __future__ import annotations

from itertools import combinations, count
from math import prod

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, BartConfig

from prefix_store import tensors
from prefix_store.errors import InvalidRequest
from prefix_store.geometry import Stack
from prefix_store.jobs import TrainingSpec
from prefix_store.model import apply, both
from prefix_store.model.frozen import measure
from prefix_store.prefix import Method, PrefixManifest
from tests.models import tiny_frozen
from trainer.methods import METHODS
from trainer.methods.stacks import StackedKV
from trainer.methods.start import initial_ids

FROZEN = apply.attach(tiny_frozen("bart"))
SIZES = {"self": 3 * 2 * 6 * 8, "cross": 3 * 2 * 6 * 8, "encoder": 2 * 2 * 4 * 12}  # numbers of a virtual token
TEXT = range(40, 60)


def spec(**options) -> TrainingSpec:
    return TrainingSpec("0" * 64, 1, **{"virtual_tokens": 5, **options})


def make(**options) -> StackedKV:
    chosen = spec(**options)
    made = METHODS[chosen.method](FROZEN, chosen, TEXT)
    assert isinstance(made, StackedKV)
    return made


def numbers(method: StackedKV) -> int:
    return sum(parameter.numel() for parameter in method.parameters())


def test_bart_large_has_the_papers_count():
    """Li & Liang 2021, section 6: 3 stacks of 12 layers' keys and values, 1,024 numbers each: 73,728 a token."""
    config = BartConfig()
    assert (config.decoder_layers, config.encoder_layers, config.d_model) == (12, 12, 1024)
    with torch.device("meta"):
        geometry = measure(AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager"))
    for length in (1, 100, 200):
        manifest = PrefixManifest(Method.PREFIX, geometry, length, position_offset=0, stacks=tuple(Stack))
        assert sum(map(prod, tensors.shapes(manifest).values())) == 73_728 * length


@pytest.mark.parametrize("stacks", [("self",), ("cross", "encoder"), ("self", "cross", "encoder")])
def test_what_is_tuned_directly_is_what_is_kept(stacks):
    method = make(stacks=stacks, frozen_tokens=0)
    found = method.tensors()
    assert numbers(method) == 5 * sum(SIZES[stack] for stack in stacks) == sum(kv.numel() for kv in found.values())
    assert [str(stack) for stack in method.manifest().stacks] == list(stacks)
    tensors.validate(method.manifest(), found)
    assert numbers(make(stacks=stacks)) == 4 * sum(SIZES[stack] for stack in stacks)  # the first is a sink


def test_the_papers_three_mlps_share_nothing():
    """P E + E M + M + M n + n for each stack, n being the numbers of a virtual token there."""
    middle, length, width = 7, 5, 48
    method = make(method="prefix_mlp", bottleneck=middle, frozen_tokens=0)
    parts = [length * width + width * middle + middle + middle * n + n for n in SIZES.values()]
    assert numbers(method) == sum(parts)
    drawn = [part.encoder.embeddings.start for part in method._parts.values()]
    assert not any(torch.equal(one, other) for one, other in combinations(drawn, 2))


@pytest.mark.parametrize("method", ["prefix", "prefix_mlp"])
def test_a_prefix_starts_as_a_text_that_each_stack_has_seen(method):
    made = make(method=method, bottleneck=64)
    expected = both.prefill(FROZEN, initial_ids(FROZEN.tokenizer, spec(), TEXT))
    for stack in Stack:
        assert (made.tensors()[f"{stack}.kv"] - expected[stack]).abs().max() < 1e-4
        assert expected[stack].std() > 0.1


def test_every_stack_and_layer_gets_a_gradient_and_a_lost_one_is_named():
    method = make()
    ids = torch.tensor([[5, 6, 7]])
    ones = torch.ones_like(ids)
    rows = method.rows(1)
    every = ["self 0", "self 1", "self 2", "cross 0", "cross 1", "cross 2", "encoder 0", "encoder 1"]
    assert set(every[:6]) <= set(method.layers_without_gradient())
    both.logits(FROZEN, ids, ones, ids, ones, rows).square().mean().backward()
    assert method.layers_without_gradient() == []
    part = method._parts[Stack.CROSS]
    part._last.grad[1] = 0
    assert method.layers_without_gradient() == ["cross 1"]


def test_a_start_without_the_stacks_that_are_asked_for_is_refused():
    kvs = both.prefill(FROZEN, list(TEXT)[:5])
    start = {"self.kv": kvs[Stack.SELF], "cross.kv": kvs[Stack.CROSS]}
    assert set(METHODS["prefix"](FROZEN, spec(), start).tensors()) == set(start)
    with pytest.raises(InvalidRequest, match=r"'encoder\.kv'"):
        METHODS["prefix"](FROZEN, spec(stacks=("encoder",)), start)
    with pytest.raises(InvalidRequest, match=r"'self\.kv'"):
        METHODS["prefix"](FROZEN, spec(), {"embeds": torch.zeros(5, 48)})


def test_a_decoder_only_model_has_the_method_itself():
    frozen = apply.attach(tiny_frozen("llama"))
    made = METHODS["prefix"](frozen, spec(), count(40))
    assert not isinstance(made, StackedKV)
    assert set(made.tensors()) == {"self.kv"}
