"""Weights in the layout oneDNN multiplies fastest. A frozen model's never change, so they are packed once, at load."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

# Rows that the packing is tuned for; other sizes run too.
ROWS_HINT = 64
# Packed and plain products add up in another order.
TOLERANCE = 1e-3


class PackedLinear(torch.nn.Module):
    """`x W^T + b` for a frozen `W` `[out, in]`. Raises RuntimeError where this build of torch cannot."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        # Plain attributes: an opaque tensor cannot be a parameter, and nobody saves a packed model.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS_HINT)
        self.bias_term = bias.detach() if bias is not None else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`."""
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias_term, "none", [], "")
        return output


def pack(model: torch.nn.Module) -> int:
    """Replaces the model's linear layers on a CPU, letting go of the plain weights; returns how many.

    Where packing is not to be had, or proves wrong on a sample, the model stays as it is and 0 is returned.
    """
    if not _works(next(model.parameters())):
        return 0
    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in (torch.nn.Linear, Conv1D):
                setattr(parent, name, _packed(child))
                replaced += 1
    return replaced


def _packed(layer: Any) -> PackedLinear:
    # GPT-2's Conv1D keeps the transpose, [in, out]
    return PackedLinear(layer.weight.t() if isinstance(layer, Conv1D) else layer.weight, layer.bias)


def _works(like: torch.Tensor) -> bool:
    if like.device.type != "cpu" or like.dtype is not torch.float32:
        return False
    generator = torch.Generator().manual_seed(0)
    weight, x, bias = (torch.randn(shape, generator=generator) for shape in ((24, 16), (5, 16), (24,)))
    try:
        packed = PackedLinear(weight, bias)(x)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return bool((packed - functional.linear(x, weight, bias)).abs().max() < TOLERANCE)
