"""Li & Liang's checkpoints (XiangLi1999/PrefixTuning): the embeddings and the MLP that a prefix came out of.

`wte.weight` is `[P, E]`; `control_trans.0`, `.2` and in the deep variant `.4` are linear layers with tanh between
them, the last of which gives a row of the flat layout. Once trained, the prefix is what the MLP makes of the
embeddings: it is evaluated here, in float32, and not kept.

That is a checkpoint for GPT-2, and the decoder's own stack in one for BART, which has such a pair for each stack, under
the names of `PAIRS`. Their GPT-2 begins at position P behind the prefix, their BART at 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from prefix_store.errors import InvalidPrefix, PrefixMismatch
from prefix_store.formats import flat
from prefix_store.geometry import ModelGeometry, Stack
from prefix_store.prefix import Method, PrefixManifest
from prefix_store.tensors import STACKS, PrefixTensors, validate

# the names of embeddings and MLP
PAIRS = {
    Stack.SELF: ("wte", "control_trans"),
    Stack.CROSS: ("wte2", "control_trans2"),
    Stack.ENCODER: ("wte_enc", "control_trans_enc"),
}
EMBEDDINGS = frozenset(f"{embedding}.weight" for embedding, _ in PAIRS.values())
PLACES = (0, 2, 4)  # of the MLP's layers, between its tanh
FEWEST = 2


def read(state: Mapping[str, torch.Tensor], geometry: ModelGeometry) -> tuple[PrefixManifest, PrefixTensors]:
    """The prefix in a checkpoint's state dict. Raises InvalidPrefix, PrefixMismatch."""
    parts = _by_stack(state)
    if geometry.encoder is None and set(parts) != {Stack.SELF}:
        raise PrefixMismatch("a checkpoint of an encoder-decoder model; expected one of GPT-2", param="file")
    rows = {stack: _evaluated(stack, part, geometry) for stack, part in parts.items()}
    if geometry.encoder is None:
        return flat.read(rows[Stack.SELF], geometry, PAIRS[Stack.SELF][1])
    return _stacked(rows, geometry)


def _by_stack(state: Mapping[str, torch.Tensor]) -> dict[Stack, dict[str, torch.Tensor]]:
    """What belongs to each stack that there is. A name that is nobody's goes to the first, which refuses it."""
    owners = {name: stack for stack, pair in PAIRS.items() for name in pair}
    found: dict[Stack, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        found.setdefault(owners.get(name.split(".")[0], Stack.SELF), {})[name] = tensor
    return {stack: found[stack] for stack in Stack if stack in found} or {Stack.SELF: {}}


def _stacked(rows: Mapping[Stack, torch.Tensor], geometry: ModelGeometry) -> tuple[PrefixManifest, PrefixTensors]:
    lengths = {flat.check(tuple(found.shape), geometry, PAIRS[stack][1], stack) for stack, found in rows.items()}
    if len(lengths) != 1:
        raise InvalidPrefix(f"expected as many virtual tokens in every stack, got {sorted(lengths)}", param="file")
    manifest = PrefixManifest(Method.PREFIX, geometry, lengths.pop(), position_offset=0, stacks=tuple(rows))
    tensors = {}
    for stack, found in rows.items():
        _, _, heads, size = geometry.kv_shape_of(stack)
        tensors[STACKS[stack]] = flat.by_layer(found, heads, size)
    validate(manifest, tensors)
    return manifest, tensors


def _evaluated(stack: Stack, part: Mapping[str, torch.Tensor], geometry: ModelGeometry) -> torch.Tensor:
    """The flat rows that one MLP makes of its embeddings, which are all that is in `part`."""
    embedding, layers = _names(stack, part)
    hidden = part[embedding].float()
    if hidden.dim() != 2 or hidden.shape[1] != geometry.hidden_size:
        raise PrefixMismatch(
            f"{embedding}: expected shape [virtual tokens, {geometry.hidden_size}], got {list(hidden.shape)}",
            param="file",
        )
    for index, layer in enumerate(layers):
        weight, bias = part[f"{layer}.weight"].float(), part[f"{layer}.bias"].float()
        if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or bias.shape != weight.shape[:1]:
            raise InvalidPrefix(
                f"{layer}: expected a layer of {hidden.shape[1]} inputs, "
                f"got weight {list(weight.shape)} and bias {list(bias.shape)}",
                param="file",
            )
        hidden = torch.nn.functional.linear(hidden.tanh() if index else hidden, weight, bias)
    return hidden


def _names(stack: Stack, part: Mapping[str, torch.Tensor]) -> tuple[str, list[str]]:
    """Of the embeddings and of the MLP's layers."""
    embedding, mlp = PAIRS[stack]
    for count in range(FEWEST, len(PLACES) + 1):
        layers = [f"{mlp}.{place}" for place in PLACES[:count]]
        if set(part) == {
            f"{embedding}.weight",
            *(f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")),
        }:
            return f"{embedding}.weight", layers
    raise InvalidPrefix(
        f"expected {embedding}.weight and the weight and bias of {mlp}.0 and {mlp}.2, "
        f"got {sorted(name[:40] for name in part)[:8]}",
        param="file",
    )
