"""Linear layers whose weights never change: both products, forward and backward, read the same plain copy of them.

Nothing is kept for a weight's gradient. On a CPU the products are oneDNN's, which torch itself takes for half precision
only: in float32 they are a tenth faster than MKL's on the layers of a GPT-2 and half as fast again on its head. Weights
in oneDNN's own layout would gain some 5 % more and need a copy for each of the two products. A head takes its rows
chunk by chunk and would be laid out anew for each of them, so it alone has such a copy, for its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from prefix_store.model import modules
from prefix_store.model.modules import Replaced

# oneDNN's and torch's own products add up in another order; see server.engine.linear.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}

# Rows that a packed layout is tuned for; other numbers run too.
ROWS = 128


class FrozenLinear(torch.nn.Module):
    """A linear layer, or GPT-2's transposed one, over the parameters of the layer that it replaces."""

    def __init__(self, layer: torch.nn.Linear | Conv1D) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.is_transposed = isinstance(layer, Conv1D)
        # no buffer: nobody saves an opaque tensor
        self.laid_out: torch.Tensor | None = None

    def lay_out(self) -> None:
        """Takes another copy of the weight, in oneDNN's own layout for the gradient's product.

        For a layer that is used many times a step, each of which would lay the weight out anew.
        """
        weight = self.weight if self.is_transposed else self.weight.t()
        self.laid_out = _packed(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`."""
        weight = self.weight.t() if self.is_transposed else self.weight
        output: torch.Tensor = _Product.apply(x, weight, self.bias, self.laid_out)
        return output


class _Product(torch.autograd.Function):
    """`x W^T + b`, and `g W` for its gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, laid_out: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.back = weight.t() if laid_out is None else laid_out
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _multiply(gradients[0], ctx.back, None), None, None, None


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _packed(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)
    return packed


def replace(model: torch.nn.Module) -> list[Replaced]:
    """Replaces the model's linear layers on a CPU; returns what was where, for putting it back.

    Elsewhere, or where this build of torch has no such product or a wrong one, nothing is replaced.
    """
    if not works(next(model.parameters())):
        return []
    return modules.replace(
        model, lambda layer: FrozenLinear(layer) if isinstance(layer, torch.nn.Linear | Conv1D) else None
    )


def works(like: torch.Tensor) -> bool:
    """Whether both products are what torch says, for weights of that dtype where they are."""
    if like.device.type != "cpu" or like.dtype not in TOLERANCES:
        return False
    generator = torch.Generator().manual_seed(0)
    sample = (torch.randn(shape, generator=generator) for shape in ((24, 16), (5, 16), (24,)))
    weight, x, bias = (tensor.to(like.dtype) for tensor in sample)
    try:
        pairs = [
            (_multiply(x, w, bias), functional.linear(x.float(), weight.float(), bias.float()))
            for w in (weight, weight.t().contiguous().t(), _packed(weight))
        ]
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return all(
        found.dtype is like.dtype and bool((found.float() - expected).abs().max() < TOLERANCES[like.dtype])
        for found, expected in pairs
    )
