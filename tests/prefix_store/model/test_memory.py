"""The reference of Prefix-Tuning+ against transformers' own attention with the formula written out behind it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from prefix_store.model import apply
from prefix_store.model.apply import PrefixRows
from prefix_store.model.memory import FEATURE_MAPS, Memory, recall
from prefix_store.prefix import PrefixManifest, Window
from tests.models import VOCABULARY, random_kv, random_memory, tiny_frozen
from tests.prefix_store.samples import Method, manifest

CLOSE, FAR = 2e-5, 0.1
FORMULAS = {
    "elu": lambda x: torch.where(x > 0, x, x.exp() - 1),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
}


def attention(module: Any, query: torch.Tensor, *args: Any, added: Any, **options: Any) -> tuple[torch.Tensor, None]:
    output, _ = sdpa_attention_forward(module, query, *args, **options)
    matrices, name = added
    for head in range(query.shape[1]):
        output[:, :, head] += FORMULAS[name](query[:, head]) @ matrices[module.layer_idx, head]
    return output, None


AttentionInterface.register("written_out", attention)
AttentionMaskInterface.register("written_out", sdpa_mask)


def ids(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", FEATURE_MAPS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "mistral", "phi"])
@torch.no_grad()
def test_a_memory_is_the_formula_behind_transformers_own_attention(family, name):
    reference, plain = apply.attach(tiny_frozen(family)), tiny_frozen(family)
    plain.model.set_attn_implementation("written_out")
    matrices = random_memory(plain)
    expected = plain.model(ids(), use_cache=False, added=(matrices, name)).logits

    def logits(matrices: torch.Tensor, name: str = name) -> torch.Tensor:
        memories = [Memory(matrices, name)] * 2
        rows = PrefixRows.stack([random_kv(plain, 0)] * 2, [0, 0], [Window.ALWAYS] * 2, memories)
        return apply.logits(reference, ids(), torch.ones_like(ids()), rows)

    assert float((logits(matrices) - expected).abs().max()) < CLOSE
    for wrong in (matrices.flip(0), matrices.flip(1), matrices.mT):
        assert float((logits(wrong) - expected).abs().max()) > FAR
    other = {"elu": "gelu", "gelu": "elu"}[name]
    assert float((logits(matrices, other) - expected).abs().max()) > FAR


def test_rows_of_every_kind_are_each_alone_forward_and_backward():
    reference = apply.attach(tiny_frozen("llama"))
    kvs = [random_kv(reference, length).requires_grad_() for length in (5, 0, 0, 0, 0)]
    first, second = (random_memory(reference, seed).requires_grad_() for seed in (1, 2))
    memories = [None, Memory(first, "elu"), Memory(second, "gelu"), None, Memory(second, "elu")]
    offsets, windows = [5, 0, 0, 0, 0], [Window.ALWAYS] * 5
    tokens = ids(5)
    together = apply.logits(
        reference, tokens, torch.ones_like(tokens), PrefixRows.stack(kvs, offsets, windows, memories)
    )
    inputs = [kvs[0], first, second]
    gradients = torch.autograd.grad(together.logsumexp(-1).square().mean(), inputs)
    single = []
    for row in range(5):
        alone = PrefixRows.stack(*([part[row]] for part in (kvs, offsets, windows, memories)))
        single.append(apply.logits(reference, tokens[row : row + 1], torch.ones(1, 12), alone))
    expected = torch.autograd.grad(torch.cat(single).logsumexp(-1).square().mean(), inputs)
    assert (together - torch.cat(single)).abs().max().item() < CLOSE
    assert (together[1] - together[4]).abs().max().item() > FAR
    for got, wanted in zip(gradients, expected, strict=True):
        assert wanted.abs().max() > 0
        assert float((got - wanted).abs().max()) < CLOSE * float(wanted.abs().max())


def test_a_memory_of_zeros_changes_nothing_and_moves_at_once():
    reference = apply.attach(tiny_frozen("llama"))
    zeros = torch.zeros_like(random_memory(reference)).requires_grad_()
    rows = PrefixRows.stack([random_kv(reference, 0)] * 2, [0, 0], [Window.ALWAYS] * 2, [Memory(zeros, "elu")] * 2)
    got = apply.logits(reference, ids(), torch.ones_like(ids()), rows)
    assert torch.equal(got, apply.logits(reference, ids(), torch.ones_like(ids()), None))
    (gradient,) = torch.autograd.grad(got.logsumexp(-1).mean(), zeros)
    assert gradient.abs().amax(dim=(2, 3)).min() > 0  # every head of every layer


def test_rows_that_share_a_memory_do_not_copy_it():
    query, matrices = torch.randn(3, 4, 5, 8), torch.randn(2, 4, 8, 8)
    shared = Memory(matrices, "elu")
    apart = [Memory(matrices.clone(), "elu") for _ in range(3)]
    assert torch.allclose(recall([shared] * 3, 1, query), recall(apart, 1, query), atol=1e-5)
    assert torch.equal(recall([None] * 3, 1, query), torch.zeros_like(query))


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_a_manifest_may_name_every_feature_map(name):
    made = manifest(Method.PREFIX_PLUS, feature_map=name)
    assert PrefixManifest.from_json(made.to_json()) == made
