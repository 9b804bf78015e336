"""Packed and rounded linear layers against plain ones, and what happens where they are not to be had."""

from __future__ import annotations

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from prefix_store.errors import ModelUnsupported
from server.engine import int8_linear, linear
from server.engine.int8_linear import Int8Linear
from server.engine.linear import PackedLinear
from tests.models import tiny_model

# Largest difference over largest result. The worst seen: 0, 0.0036 and none (no processor for it at hand); 0.008.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 0.006, torch.float16: 0.001}
INT8_TOLERANCE = 0.02
ROWS = (1, 2, 7, 64, 65)


def layers(dtype: torch.dtype, inputs: int = 96, outputs: int = 160) -> list[torch.nn.Module]:
    """A linear layer and GPT-2's transposed kind, seeded."""
    torch.manual_seed(0)
    plain, transposed = torch.nn.Linear(inputs, outputs), Conv1D(outputs, inputs)
    torch.nn.init.normal_(transposed.weight, std=0.1)
    torch.nn.init.normal_(transposed.bias)
    return [layer.to(dtype).requires_grad_(False) for layer in (plain, transposed)]


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected).abs().max() / expected.abs().max())


def needs(condition: bool) -> None:
    if not condition:
        pytest.skip("this machine has no such product")


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_packed_products_are_the_plain_ones(dtype):
    model = torch.nn.Sequential(*layers(dtype)[:1])
    needs(linear._works(model[0].weight))
    for layer in layers(dtype):
        x = torch.randn(1, 9, 96).to(dtype)
        exact = layer.float()(x.float())
        model = torch.nn.Sequential(layer.to(dtype))
        assert linear.pack(model) == 1
        assert isinstance(model[0], PackedLinear)
        assert model(x).dtype is dtype
        assert relative(model(x), exact) < TOLERANCES[dtype]
        assert relative(model(x.flip(1)), exact) > 10 * TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_products_are_nearly_the_plain_ones(dtype):
    needs(int8_linear.works())
    for layer in layers(dtype):
        x = torch.randn(1, 9, 96).to(dtype)
        exact = layer.float()(x.float())
        model = torch.nn.Sequential(layer.to(dtype))
        assert linear.quantize(model) == 1
        assert model(x).dtype is dtype
        assert 0 < relative(model(x), exact) < INT8_TOLERANCE
        assert relative(model(x.flip(1)), exact) > 10 * INT8_TOLERANCE


@pytest.mark.parametrize("kind", [PackedLinear, Int8Linear])
def test_a_rows_result_does_not_depend_on_its_neighbours(kind):
    layer = layers(torch.bfloat16, 384, 512)[0]
    needs(int8_linear.works() if kind is Int8Linear else linear._works(layer.weight))
    made, x = kind(layer.weight, layer.bias), torch.randn(max(ROWS), 384).bfloat16()
    x[1:] *= torch.logspace(-3, 3, len(x) - 1)[:, None].bfloat16()  # a scale common to all would drown the first
    alone = made(x[:1])
    for rows in ROWS:
        if kind is Int8Linear:
            assert torch.equal(made(x[:rows])[:1], alone)  # sums of integers
        else:
            assert relative(made(x[:rows])[:1], alone.float()) < 2**-7  # a unit in the last place
    assert relative(made(x[1:2] / 1000)[:1], alone.float()) > 0.1


def test_a_row_that_overflows_is_seen_and_no_other():
    needs(int8_linear.works())
    layer = layers(torch.bfloat16)[0]
    made, x = Int8Linear(layer.weight, layer.bias), torch.randn(4, 96).bfloat16()
    sound = made(x)
    x[1, 5], x[2, 7] = torch.inf, torch.nan
    got = made(x)
    assert torch.equal(got[[0, 3]], sound[[0, 3]])
    assert not got[[1, 2]].isfinite().any()


def test_zeros_are_no_division_by_zero():
    needs(int8_linear.works())
    bias = torch.arange(8.0)
    assert torch.equal(Int8Linear(torch.zeros(8, 16), bias)(torch.zeros(3, 16)), bias.expand(3, -1))
    assert Int8Linear(torch.zeros(8, 16), None)(torch.zeros(1, 0, 16)).shape == (1, 0, 8)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_nothing_keeps_the_plain_weights(family):
    needs(int8_linear.works())
    for replace in (linear.pack, linear.quantize):
        model = tiny_model(family)
        assert replace(model) > model.config.num_hidden_layers
        for name, parameter in model.named_parameters():
            assert parameter.dim() < 2 or "wte" in name or "wpe" in name or "embed_tokens" in name, name


def _refuse(*_):
    raise RuntimeError("not on this processor")


@pytest.mark.parametrize("missing", [_refuse, None])
def test_without_the_private_operators_the_model_stays_plain(missing, monkeypatch):
    model = tiny_model("gpt2")
    x = torch.tensor([[3, 4, 5]])
    expected = model(x).logits
    if missing is None:
        monkeypatch.delattr(PackedLinear, "forward")
    else:
        monkeypatch.setattr(PackedLinear, "__init__", missing)
    assert linear.pack(model) == 0
    assert torch.equal(model(x).logits, expected)


def test_a_packed_product_that_is_wrong_is_not_used(monkeypatch):
    forward = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: forward(self, x).roll(1, -1))
    assert linear.pack(tiny_model("gpt2")) == 0


def test_int8_is_refused_where_it_is_not_to_be_had(monkeypatch):
    with pytest.raises(ModelUnsupported, match="int8 is for the CPU"):
        linear.quantize(torch.nn.Linear(4, 4, device="meta"))
    monkeypatch.setattr(Int8Linear, "__init__", _refuse)
    with pytest.raises(ModelUnsupported, match="ask for bfloat16"):
        linear.quantize(tiny_model("gpt2"))


def test_int8_sums_that_saturate_are_found_out(monkeypatch):
    needs(int8_linear.works())
    forward = Int8Linear.forward
    monkeypatch.setattr(Int8Linear, "forward", lambda self, x: forward(self, x).clamp(max=2 * 32767))
    assert not int8_linear.works()
