"""A stored prefix in front of several rows, for a model of either kind."""

from __future__ import annotations

import pytest
import torch

from prefix_store.errors import ModelUnsupported
from prefix_store.geometry import Stack
from prefix_store.model import stored
from prefix_store.model.rows import PrefixRows, StackRows
from prefix_store.prefix import Method, PrefixManifest
from tests.models import random_kv, random_kvs, random_memory, tiny_frozen

BART, LLAMA = tiny_frozen("bart"), tiny_frozen("llama")


def test_every_row_gets_the_same_keys_and_values():
    kv = random_kv(LLAMA, 3)
    found = stored.repeated(LLAMA, PrefixManifest(Method.PREFIX, LLAMA.geometry, 3, 3), {"self.kv": kv}, 4)
    assert isinstance(found, PrefixRows)
    assert (found.kv == kv).all()
    assert (found.offset.tolist(), found.back.tolist()) == ([3] * 4, [3] * 4)


def test_stacks_keep_their_names_and_the_offset_is_the_files():
    stacks = (Stack.CROSS, Stack.ENCODER)
    kvs = random_kvs(BART, 3, 0, stacks)
    manifest = PrefixManifest(Method.PREFIX, BART.geometry, 3, 3, stacks=stacks)
    found = stored.repeated(BART, manifest, {f"{stack}.kv": kv.half() for stack, kv in kvs.items()}, 2)
    assert isinstance(found, StackRows)
    assert found.offset.tolist() == [3, 3]
    for stack in stacks:
        assert found.stacks[stack].kv.dtype is torch.float32
        assert (found.stacks[stack].kv == kvs[stack].half()).all()


def test_a_soft_prompt_stays_embeddings_beside_an_encoder():
    embeds = torch.randn(3, 48)
    found = stored.repeated(BART, PrefixManifest(Method.PROMPT, BART.geometry, 3, 0), {"embeds": embeds}, 2)
    assert isinstance(found, StackRows)
    assert found.embeds is not None
    assert (found.embeds == embeds).all()
    assert (dict(found.stacks), found.offset.tolist()) == ({}, [0, 0])


def test_a_memory_beside_an_encoder_is_refused():
    manifest = PrefixManifest(Method.PREFIX_PLUS, BART.geometry, 0, 0, feature_map="elu")
    with pytest.raises(ModelUnsupported, match="memory"):
        stored.repeated(BART, manifest, {"memory": random_memory(BART)}, 2)
