"""Gated feed-forward layers in three products that do the activation and the gating on their way out."""

from __future__ import annotations

from typing import Any

import torch
from transformers.activations import GELUTanh, SiLUActivation

from prefix_store.model import modules
from server.engine.linear import Activation, PackedLinear

ACTIVATIONS: dict[type[torch.nn.Module], Activation] = {
    torch.nn.SiLU: ("swish", ""),
    SiLUActivation: ("swish", ""),
    GELUTanh: ("gelu", "tanh"),
}
NAMES = ("gate_proj", "up_proj", "down_proj", "act_fn")
# Largest difference over largest result; half precision is rounded in other places.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.005}


class GatedLinear(torch.nn.Module):
    """`W_down (act(W_gate x) * (W_up x))` (Shazeer 2020, arXiv 2002.05202) of packed layers, in `plain`'s stead."""

    def __init__(self, plain: Any, activation: Activation) -> None:
        super().__init__()
        modules.keep_plain(self, plain)
        self.gate_proj: PackedLinear = plain.gate_proj
        self.up_proj: PackedLinear = plain.up_proj
        self.down_proj: PackedLinear = plain.down_proj
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., E]` to `[..., E]`."""
        output: torch.Tensor = self.down_proj(self.up_proj.times(x, self.gate_proj(x, self.activation)))
        return output


def fuse(model: torch.nn.Module) -> int:
    """Replaces the gated layers of a model whose linear layers are packed; returns how many.

    A layer that has the parts and gives something else on a sample stays as it is.
    """
    return len(modules.replace(model, _fused))


def _fused(layer: Any) -> GatedLinear | None:
    if type(layer) is GatedLinear or not all(hasattr(layer, name) for name in NAMES):
        return None
    products = (layer.gate_proj, layer.up_proj, layer.down_proj)
    activation = ACTIVATIONS.get(type(layer.act_fn))
    if activation is None or not all(type(product) is PackedLinear for product in products):
        return None
    fused = GatedLinear(layer, activation)
    return fused if _agree(layer, fused) else None


@torch.inference_mode()
def _agree(layer: torch.nn.Module, fused: GatedLinear) -> bool:
    x = torch.randn(5, fused.gate_proj.inputs, generator=torch.Generator().manual_seed(0)).to(fused.gate_proj.dtype)
    expected = layer(x).float()
    difference = (fused(x).float() - expected).abs().max() / expected.abs().max()
    return bool(difference < TOLERANCES[x.dtype])
