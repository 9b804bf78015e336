"""The flat layout of keys and values, `[P, 2*L*Hkv*D]`, in which PEFT's, rinna's and Li & Liang's prefixes agree.

Column `(2*layer + c)*Hkv*D + head*D + j` of row `p` is number `j` of virtual token `p`, c being 0 for keys and 1
for values. Real tokens start at position P, and sliding-window layers let the prefix slide out of sight.
"""

from __future__ import annotations

import torch

from prefix_store.errors import InvalidPrefix, PrefixMismatch
from prefix_store.geometry import ModelGeometry, Stack
from prefix_store.prefix import Method, PrefixManifest, Window
from prefix_store.tensors import PAYLOADS, PrefixTensors, validate

KV = PAYLOADS[Method.PREFIX]


def describe(shape: tuple[int, ...], geometry: ModelGeometry, name: str) -> PrefixManifest:
    """The manifest of a flat tensor of this shape. Raises InvalidPrefix, PrefixMismatch; messages call it `name`."""
    length = check(shape, geometry, name)
    return PrefixManifest(Method.PREFIX, geometry, length, position_offset=length, window=Window.SLIDES)


def check(shape: tuple[int, ...], geometry: ModelGeometry, name: str, stack: Stack = Stack.SELF) -> int:
    """The virtual tokens of a flat tensor of this shape, for one stack. Raises as `describe`."""
    layers, pair, heads, size = geometry.kv_shape_of(stack)
    columns = layers * pair * heads * size
    if len(shape) != 2 or shape[0] < 1:
        raise InvalidPrefix(f"{name}: expected shape [virtual tokens, {columns}], got {list(shape)}", param="file")
    length, got = shape
    if got != columns:
        raise PrefixMismatch(
            f"{name}: this model's keys and values need 2*{layers} layers*{heads} KV heads*{size} = {columns} columns, "
            f"got {got}; a soft prompt has {geometry.hidden_size}",
            param="file",
        )
    return length


def read(flat: torch.Tensor, geometry: ModelGeometry, name: str) -> tuple[PrefixManifest, PrefixTensors]:
    """The prefix in a flat tensor. Raises what `describe` raises, and InvalidPrefix for values that are no numbers."""
    manifest = describe(tuple(flat.shape), geometry, name)
    kv = by_layer(flat, geometry.kv_heads, geometry.head_dim)
    validate(manifest, {KV: kv})
    return manifest, {KV: kv}


def by_layer(flat: torch.Tensor, heads: int, size: int) -> torch.Tensor:
    """A flat tensor as canonical keys and values, of as many layers as it has columns for."""
    return flat.reshape(len(flat), -1, 2, heads, size).permute(1, 2, 3, 0, 4).contiguous()


def write(kv: torch.Tensor) -> torch.Tensor:
    """Canonical keys and values as one flat tensor."""
    return kv.detach().cpu().permute(3, 0, 1, 2, 4).flatten(1).contiguous()
