"""The model that an engine has taken over, once more as it was: the same weights, read by other modules.

An engine binds a model's attention to its pool, packs the linear layers and fuses others, for good. A second tree of
modules, without a weight of its own, has any other attention over the same weights, and may run in another thread.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.nn import functional

from prefix_store.model import apply, modules
from prefix_store.model.frozen import FrozenModel
from server.engine.int8_linear import Int8Linear
from server.engine.linear import PackedLinear
from server.engine.model_runner import bind
from server.engine.siblings import Sibling

# transformers' own attention, in the form that every family has
PLAIN = "eager"
ALL_ROWS = slice(None)


class UnpackedLinear(torch.nn.Module):
    """A packed linear layer as torch itself computes it: the weights are laid out plainly, bit by bit, each time."""

    def __init__(self, layer: PackedLinear, rows: slice = ALL_ROWS) -> None:
        super().__init__()
        # no submodule, whose opaque weights nobody could copy
        self.__dict__["layer"] = layer
        self.rows = rows

    @property
    def weight(self) -> torch.Tensor:
        """As `PackedLinear.weight`."""
        layer: PackedLinear = self.__dict__["layer"]
        return layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`."""
        layer: PackedLinear = self.__dict__["layer"]
        bias = layer.bias_term
        return functional.linear(x, layer.packed.to_dense()[self.rows], None if bias is None else bias[self.rows])


def plain(frozen: FrozenModel) -> FrozenModel:
    """transformers with its own attention."""
    return _again(frozen, PLAIN)


def attached(frozen: FrozenModel) -> FrozenModel:
    """The reference that training uses. Unlike `apply.attach` it probes nothing: the engine's self-test has."""
    return _again(frozen, apply.NAME)


def weights(frozen: FrozenModel) -> str:
    """What a second tree computes with, in words. int8 layers have let go of the weights that they were made from."""
    dtype = str(frozen.dtype).removeprefix("torch.")
    if is_int8(frozen):
        return f"the int8 linear layers that are served; {dtype} elsewhere"
    return f"the {dtype} weights as they were loaded"


def is_int8(frozen: FrozenModel) -> bool:
    """Whether linear layers were rounded to 8-bit integers."""
    return any(isinstance(module, Int8Linear) for module in frozen.model.modules())


def _again(frozen: FrozenModel, attention: str) -> FrozenModel:
    """Takes milliseconds and no memory to speak of."""
    known: dict[int, object] = {}
    for module in _all(frozen.model):
        held = [*vars(module).values(), *module.parameters(recurse=False), *module.buffers(recurse=False)]
        known |= {id(value): value for value in held if isinstance(value, torch.Tensor)}
        if isinstance(module, PackedLinear):
            known[id(module)] = UnpackedLinear(module)
        elif isinstance(module, Sibling):
            known[id(module)] = UnpackedLinear(module.siblings.product, module.siblings.rows(module.index))
    model = copy.deepcopy(frozen.model, known)
    modules.make_plain(model)
    bind(model, attention)
    return replace(frozen, model=model)


def _all(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The model's modules, and those that some of them stand for."""
    for module in model.modules():
        yield module
        yield from filter(None, (modules.plain_of(module),))
