"""Projections in one product against the three, and what is left as it was."""

from __future__ import annotations

import pytest
import torch

from server.engine import linear, siblings
from server.engine.linear import PackedLinear
from server.engine.siblings import Sibling, Siblings
from tests.models import tiny_model

JOINED = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "opt", "phi"]


def packed(family: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    model = tiny_model(family).to(dtype)
    if not linear.pack(model):
        pytest.skip("this torch packs no linear layers")
    return model


def attentions(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if hasattr(module, "q_proj")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", JOINED)
def test_each_part_is_what_its_layer_gave(family, dtype):
    model = packed(family, dtype)
    attention = attentions(model)[1]
    (names,) = (names for names in siblings.NAMES if hasattr(attention, names[0]))
    plain = [getattr(attention, name) for name in names]
    x = torch.randn(1, 70, plain[0].inputs, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.inference_mode():
        expected = [layer(x).float() for layer in plain]
        assert siblings.fuse(model) == len(attentions(model))
        made = [getattr(attention, name) for name in names]
        assert {type(layer) for layer in made} == {Sibling}
        for layer, wanted in zip(made, expected, strict=True):
            tolerance = linear.TOLERANCES[dtype] * wanted.abs().max()
            assert (layer(x).float() - wanted).abs().max() < tolerance
            assert (layer(x.flip(1)).float() - wanted).abs().max() > 10 * tolerance
    assert siblings.fuse(model) == 0


def test_one_product_serves_all_of_one_input_in_any_order(monkeypatch):
    joined = Siblings([PackedLinear(torch.randn(rows, 48), torch.randn(rows)) for rows in (24, 8, 16)])
    calls = []
    product = joined.product
    monkeypatch.setattr(joined, "product", lambda x: calls.append(x) or product(x))
    x, y = torch.randn(1, 3, 48), torch.randn(1, 3, 48)
    for order in ((0, 1, 2), (2, 0, 1)):
        for index in order:
            assert torch.equal(joined.part(x, index), product(x)[..., joined.rows(index)])
    assert len(calls) == 2
    # a part left over is of no use to another input, nor to the same one when its numbers have changed
    assert torch.equal(joined.part(x, 0), product(x)[..., :24])
    assert torch.equal(joined.part(y, 1), product(y)[..., 24:32])
    assert torch.equal(joined.part(x.zero_(), 0), product(x)[..., :24])
    assert torch.equal(joined.part(x.fill_(2), 0), product(x)[..., :24])


def test_nothing_is_kept_once_all_have_their_part():
    joined = Siblings([PackedLinear(torch.randn(8, 16), None) for _ in range(3)])
    x = torch.randn(1, 2, 16)
    for index in range(3):
        joined.part(x, index)
    assert joined._input is None
    assert not joined._parts


def test_a_join_that_is_wrong_is_not_used(monkeypatch):
    model = packed("llama")
    part = Siblings.part
    monkeypatch.setattr(Siblings, "part", lambda self, x, index: part(self, x, index).roll(1, -1))
    assert siblings.fuse(model) == 0
    assert all(type(attention.q_proj) is PackedLinear for attention in attentions(model))


def test_what_is_joined_already_or_not_packed_is_left_alone():
    assert siblings.fuse(packed("gpt2")) == 0
    assert siblings.fuse(packed("phi3")) == 0
    assert siblings.fuse(tiny_model("llama")) == 0
    model = packed("llama")
    odd = attentions(model)[0]
    odd.v_proj = PackedLinear(torch.randn(16, 48), torch.randn(16))  # the only one with a bias
    assert siblings.fuse(model) == len(attentions(model)) - 1
    assert type(odd.q_proj) is PackedLinear


def test_no_second_copy_of_the_weights_is_held():
    model = packed("llama")
    attention = attentions(model)[0]
    held = sum(getattr(attention, name).packed.to_dense().numel() for name in siblings.NAMES[0])
    siblings.fuse(model)
    product = attention.q_proj.siblings.product
    assert attention.v_proj.siblings.product is product
    assert product.packed.to_dense().numel() == held
    assert not any(type(getattr(attention, name)) is PackedLinear for name in siblings.NAMES[0])
