"""Products of frozen layers, forward and backward, against torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from tests.models import tiny_model
from trainer import frozen_linear
from trainer.frozen_linear import FrozenLinear

# Largest difference over largest result. Observed: 4e-7, 0.004 and none (no processor for it at hand).
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 0.01, torch.float16: 0.002}


def layers(dtype: torch.dtype) -> list[torch.nn.Module]:
    torch.manual_seed(0)
    bare, plain, transposed = torch.nn.Linear(96, 160, bias=False), torch.nn.Linear(96, 160), Conv1D(160, 96)
    torch.nn.init.normal_(transposed.weight, std=0.1)
    torch.nn.init.normal_(transposed.bias)
    return [layer.to(dtype).requires_grad_(False) for layer in (bare, plain, transposed)]


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    got, expected = got.detach().float(), expected.detach().float()
    return float((got - expected).abs().max() / expected.abs().max())


def saved_numbers(layer: torch.nn.Module, x: torch.Tensor) -> int:
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        layer(x)
    return sum(saved)


@pytest.mark.parametrize("is_laid_out", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_products_and_gradients_are_torchs(dtype, is_laid_out):
    if not frozen_linear.works(torch.zeros(1, dtype=dtype)):
        pytest.skip("this machine has no such product")
    for layer in layers(dtype):
        exact, made = copy.deepcopy(layer).float(), FrozenLinear(layer)
        if is_laid_out:
            made.lay_out()
        x = torch.randn(2, 9, 96).to(dtype).requires_grad_()
        upstream = torch.randn(2, 9, 160).to(dtype)
        outputs = made(x), exact(x.float())
        gradients = [torch.autograd.grad(out, x, upstream.to(out.dtype))[0] for out in outputs]
        assert outputs[0].dtype is gradients[0].dtype is dtype
        assert relative(*outputs) < TOLERANCES[dtype]
        assert relative(*gradients) < TOLERANCES[dtype]
        assert relative(gradients[0].flip(2), gradients[1]) > 0.1


def test_nothing_is_kept_for_a_weight():
    for layer in layers(torch.float32):
        assert saved_numbers(FrozenLinear(layer), torch.randn(9, 96, requires_grad=True)) == 0


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_linear_layer_is_replaced_and_can_be_put_back(family):
    model = tiny_model(family).requires_grad_(False)
    before = dict(model.named_modules())
    replaced = frozen_linear.replace(model)
    assert len(replaced) > model.config.num_hidden_layers
    assert not any(type(module) in (torch.nn.Linear, Conv1D) for module in model.modules())
    assert isinstance(model.lm_head, FrozenLinear)
    assert model.lm_head.weight is model.get_input_embeddings().weight  # tied as it was
    for parent, name, child in replaced:
        setattr(parent, name, child)
    assert dict(model.named_modules()) == before


def test_without_the_private_operator_the_model_stays_as_it_is(monkeypatch):
    def refuse(*_):
        raise RuntimeError("not on this processor")

    monkeypatch.setattr(frozen_linear, "_multiply", refuse)
    assert frozen_linear.replace(tiny_model("gpt2")) == []
    monkeypatch.setattr(frozen_linear, "_multiply", lambda x, w, b: torch.nn.functional.linear(x, w, b).roll(1, -1))
    assert frozen_linear.replace(tiny_model("gpt2")) == []


def test_what_is_not_on_a_cpu_is_left_to_torch():
    assert frozen_linear.replace(torch.nn.Sequential(torch.nn.Linear(4, 4, device="meta"))) == []
