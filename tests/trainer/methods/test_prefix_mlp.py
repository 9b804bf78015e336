from __future__ import annotations

from itertools import count

import pytest
import torch

from prefix_store import tensors
from prefix_store.jobs import TrainingSpec
from prefix_store.model import apply
from prefix_store.prefix import Method, PrefixManifest, Window
from tests.models import BOS, CONTEXT, tiny_frozen
from trainer.methods.prefix_mlp import MLPPrefix

P, MIDDLE = 4, 32


def make(family: str = "llama", **options) -> MLPPrefix:
    frozen = apply.attach(tiny_frozen(family))
    given = {"method": "prefix_mlp", "virtual_tokens": P, "bottleneck": MIDDLE, **options}
    return MLPPrefix(frozen, TrainingSpec("0" * 64, 1, **given), count(40))


def one_step(method: MLPPrefix, rate: float = 0.1) -> None:
    ids = torch.arange(2, 14).reshape(2, 6)
    optimiser = torch.optim.AdamW(method.parameters(), lr=rate, weight_decay=0.0)
    apply.logits(method.frozen, ids, torch.ones_like(ids), method.rows(2)).square().mean().backward()
    optimiser.step()


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("virtual_tokens", [1, P])
def test_it_starts_as_the_text_in_context(family, virtual_tokens):
    method = make(family, virtual_tokens=virtual_tokens)
    text = apply.prefill_kv(method.frozen, [BOS, *range(40, 40 + virtual_tokens - 1)])
    assert (method.kv() - text).abs().max() < 1e-4 * text.abs().max()
    assert (method.kv().flip(1) - text).abs().max() > 0.1 * text.abs().max()


@pytest.mark.parametrize("frozen_tokens", [0, 1, 2])
def test_the_first_tokens_stay_as_they_were_and_the_others_do_not(frozen_tokens):
    method = make(frozen_tokens=frozen_tokens)
    before = method.kv().detach()
    one_step(method)
    same = (method.kv() == before).flatten(0, 2).all(dim=2).all(dim=0)
    assert same.tolist() == [token < frozen_tokens for token in range(P)]


def test_one_mlp_makes_all_layers_so_every_weight_gets_a_gradient_and_so_does_every_layer():
    method = make()
    one_step(method)
    assert method.layers_without_gradient() == []
    assert [tuple(parameter.shape) for parameter in method.parameters()] == [
        (P - 1, 16), (MIDDLE, 16), (MIDDLE,), (3 * 2 * 16, MIDDLE), (3 * 2 * 16,)
    ]  # fmt: skip
    assert all(parameter.grad.any() for parameter in method.parameters())


def test_the_file_keeps_keys_and_values_and_no_mlp():
    method = make()
    one_step(method)
    manifest, kept = method.manifest(), method.tensors()
    geometry, digest = method.frozen.geometry, method.frozen.digest
    assert manifest == PrefixManifest(Method.PREFIX, geometry, P, P, digest, Window.ALWAYS)
    tensors.validate(manifest, kept)
    tensors.check_fits(manifest, geometry, digest, CONTEXT)
    assert torch.equal(kept["self.kv"], method.kv())
