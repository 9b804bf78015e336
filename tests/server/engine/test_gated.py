"""Gated layers in three products against transformers' own, and what is left as it was."""

from __future__ import annotations

import copy

import pytest
import torch

from server.engine import gated, linear
from server.engine.gated import GatedLinear
from tests.models import tiny_model


def packed(family: str, dtype: torch.dtype) -> torch.nn.Module:
    model = tiny_model(family).to(dtype)
    if not linear.pack(model):
        pytest.skip("this torch packs no linear layers")
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_a_gated_layer_gives_what_it_gave(family, dtype):
    model = packed(family, dtype)
    plain = copy.copy(model.model.layers[1].mlp)
    x = torch.randn(1, 70, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.inference_mode():
        expected = plain(x)
        assert gated.fuse(model) == len(model.model.layers)
        fused = model.model.layers[1].mlp
        assert type(fused) is GatedLinear
        got = fused(x)
        assert got.dtype is dtype
        scale = float(expected.float().abs().max())
        assert float((got.float() - expected.float()).abs().max()) < gated.TOLERANCES[dtype] * scale
        fused.activation = ("relu", "")
        assert float((fused(x).float() - expected.float()).abs().max()) > 0.1 * scale
    assert gated.fuse(model) == 0


def test_rows_do_not_depend_on_their_neighbours():
    model = packed("llama", torch.float32)
    gated.fuse(model)
    x = torch.randn(1, 9, 48, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        mlp = model.model.layers[0].mlp
        assert float((mlp(x)[:, 4] - mlp(x[:, 4:5])[:, 0]).abs().max()) < 1e-6


def test_what_is_not_gated_or_is_more_than_gated_is_left_alone():
    assert gated.fuse(packed("gpt2", torch.float32)) == 0
    assert gated.fuse(tiny_model("llama")) == 0  # its layers are not packed
    model = packed("llama", torch.float32)
    kind = type(model.model.layers[0].mlp)

    class Halved(kind):
        def forward(self, x):
            return super().forward(x) / 2

    for layer in model.model.layers:
        layer.mlp.__class__ = Halved
    assert gated.fuse(model) == 0
