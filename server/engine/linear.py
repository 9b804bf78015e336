"""Weights in the layout oneDNN multiplies fastest. A frozen model's never change, so they are packed once, at load."""

from __future__ import annotations

import torch
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from prefix_store.errors import ModelUnsupported
from prefix_store.model import modules
from server.engine import int8_linear
from server.engine.int8_linear import ROWS_HINT, Int8Linear

# Packed and plain products add up in another order; the half-precision ones are rounded once more, after products of
# up to about 16: a unit in bfloat16's last place is 0.06 there.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}

# oneDNN's name of an activation that a product ends with, and of its algorithm.
Activation = tuple[str, str]
NO_ACTIVATION: Activation = ("none", "")


class PackedLinear(torch.nn.Module):
    """`x W^T + b` for a frozen `W` `[out, in]`. Raises RuntimeError where this build of torch cannot."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.inputs, self.dtype = weight.shape[1], weight.dtype
        # Plain attributes: an opaque tensor cannot be a parameter, and nobody saves a packed model.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS_HINT)
        self.bias_term = bias.detach() if bias is not None else None

    @property
    def weight(self) -> torch.Tensor:
        """Opaque: for T5, which asks for its dtype."""
        return self.packed

    def forward(self, x: torch.Tensor, activation: Activation = NO_ACTIVATION) -> torch.Tensor:
        """`[..., in]` to `[..., out]`."""
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.packed, self.bias_term, activation[0], [], activation[1]
        )
        return output

    def times(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The result, multiplied by `other` `[..., out]` in the same pass."""
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self.packed, self.bias_term, "mul")
        return output


def pack(model: torch.nn.Module) -> int:
    """Replaces the model's linear layers on a CPU, letting go of the plain weights; returns how many.

    Where packing is not to be had, or proves wrong on a sample, the model stays as it is and 0 is returned.
    """
    return _replace(model, PackedLinear) if _works(next(model.parameters())) else 0


def quantize(model: torch.nn.Module) -> int:
    """As `pack`, to int8. Raises ModelUnsupported where that is not to be had: it was asked for by name."""
    parameter = next(model.parameters())
    if parameter.device.type != "cpu":
        raise ModelUnsupported(f"int8 is for the CPU, not for {parameter.device.type}: ask for bfloat16")
    if not int8_linear.works():
        raise ModelUnsupported("this torch, or this processor, has no int8 product to be trusted: ask for bfloat16")
    return _replace(model, Int8Linear)


def _replace(model: torch.nn.Module, kind: type[PackedLinear | Int8Linear]) -> int:
    def made(layer: torch.nn.Module) -> torch.nn.Module | None:
        if type(layer) not in (torch.nn.Linear, Conv1D):
            return None
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        # GPT-2's Conv1D keeps the transpose, [in, out]
        return kind(weight.t() if isinstance(layer, Conv1D) else weight, layer.bias)  # type: ignore[arg-type]

    return len(modules.replace(model, made))


def _works(like: torch.Tensor) -> bool:
    if like.device.type != "cpu" or like.dtype not in TOLERANCES:
        return False
    generator = torch.Generator().manual_seed(0)
    sample = (torch.randn(shape, generator=generator) for shape in ((24, 16), (5, 16), (24,)))
    weight, x, bias = (tensor.to(like.dtype) for tensor in sample)
    try:
        packed = PackedLinear(weight, bias)(x)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    expected = functional.linear(x.float(), weight.float(), bias.float())
    return packed.dtype is like.dtype and bool((packed.float() - expected).abs().max() < TOLERANCES[like.dtype])
