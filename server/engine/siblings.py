"""Projections that read the same input, queries, keys and values, in one product instead of three."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from prefix_store.geometry import Stack
from prefix_store.model import sites
from server.engine.linear import TOLERANCES, PackedLinear

# T5 has the short ones.
NAMES = (("q_proj", "k_proj", "v_proj"), ("q", "k", "v"))


class Siblings:
    """Packed layers of one input as one layer: the first that is asked computes for all, each takes its part once.

    For one thread, as the engine's is. The weights are laid out again, and there is no second copy of them.
    """

    def __init__(self, layers: Sequence[PackedLinear]) -> None:
        weights = [layer.packed.to_dense() for layer in layers]
        biases = [layer.bias_term for layer in layers if layer.bias_term is not None]
        self.sizes = [len(weight) for weight in weights]
        self.product = PackedLinear(torch.cat(weights), torch.cat(biases) if biases else None)
        self._input: torch.Tensor | None = None
        self._parts: dict[int, torch.Tensor] = {}

    def part(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """What the layer of that index makes of `x`: a view into `[..., all out]`."""
        # another tensor, or the same once more, whose numbers may be others by now
        if x is not self._input or index not in self._parts:
            self._input, self._parts = x, dict(enumerate(self.product(x).split(self.sizes, -1)))
        part = self._parts.pop(index)
        if not self._parts:
            self._input = None
        return part

    def rows(self, index: int) -> slice:
        """Where that layer's weights and bias stand among all."""
        start = sum(self.sizes[:index])
        return slice(start, start + self.sizes[index])


class Sibling(torch.nn.Module):
    """One of `Siblings`, in the place of a packed layer."""

    def __init__(self, siblings: Siblings, index: int) -> None:
        super().__init__()
        self.siblings, self.index = siblings, index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`."""
        return self.siblings.part(x, self.index)


def fuse(model: torch.nn.Module) -> int:
    """Joins the projections of every attention whose linear layers are packed; returns how many attentions changed."""
    return sum(_joined(module) for module in model.modules())


def _joined(module: Any) -> bool:
    # a cross-attention's queries come of another input than its keys and values
    return sites.stack_of(module) is not Stack.CROSS and any(_join(module, names) for names in NAMES)


def _join(module: Any, names: Sequence[str]) -> bool:
    found = [getattr(module, name, None) for name in names]
    layers = [layer for layer in found if type(layer) is PackedLinear]
    if len(layers) < len(names):
        return False
    kinds = {(layer.inputs, layer.dtype, layer.bias_term is None) for layer in layers}
    if len(kinds) > 1:
        return False
    siblings = Siblings(layers)
    made = [Sibling(siblings, index) for index in range(len(layers))]
    if not _agree(layers, made):
        return False
    for name, sibling in zip(names, made, strict=True):
        setattr(module, name, sibling)
    return True


@torch.inference_mode()
def _agree(layers: Sequence[PackedLinear], made: Sequence[Sibling]) -> bool:
    x = torch.randn(5, layers[0].inputs, generator=torch.Generator().manual_seed(0)).to(layers[0].dtype)
    pairs = [(layer(x).float(), sibling(x).float()) for layer, sibling in zip(layers, made, strict=True)]
    return all(
        got.shape == expected.shape and bool((got - expected).abs().max() <= TOLERANCES[x.dtype] * expected.abs().max())
        for expected, got in pairs
    )
