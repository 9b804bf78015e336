"""A prefix's numbers in their canonical layouts, and the check that they are what the manifest says.

A KV prefix has one tensor for each of its stacks, `self.kv` being the decoder's own; the other methods have one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from prefix_store.errors import InvalidPrefix, PrefixMismatch
from prefix_store.geometry import ModelGeometry, Stack
from prefix_store.prefix import Method, PrefixManifest

STACKS = {stack: f"{stack}.kv" for stack in Stack}
# tensor name in the native file, by method; a KV prefix of an encoder-decoder model may have others, by `STACKS`
PAYLOADS = {
    Method.PREFIX: STACKS[Stack.SELF],
    Method.TEXT: STACKS[Stack.SELF],
    Method.PROMPT: "embeds",
    Method.PREFIX_PLUS: "memory",
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Far above anything attention can use, far below what overflows a product in float32.
LARGEST = 1e6

PrefixTensors = dict[str, torch.Tensor]


def shapes(manifest: PrefixManifest) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape: KV `[L, 2, Hkv, P, D]` by stack, embeds `[P, E]`, memory `[L, Hq, D, D]`."""
    geometry, length, name = manifest.geometry, manifest.virtual_tokens, PAYLOADS[manifest.method]
    if manifest.method is Method.PROMPT:
        return {name: (length, geometry.hidden_size)}
    if manifest.method is Method.PREFIX_PLUS:
        return {name: (geometry.layers, geometry.query_heads, geometry.head_dim, geometry.head_dim)}
    return {STACKS[stack]: _kv_shape(geometry.kv_shape_of(stack), length) for stack in manifest.stacks}


def _kv_shape(shape: tuple[int, int, int, int], length: int) -> tuple[int, ...]:
    layers, two, heads, size = shape
    return layers, two, heads, length, size


def check_shapes(manifest: PrefixManifest, found: Mapping[str, Sequence[int]]) -> None:
    """Raises InvalidPrefix unless tensors of these names and shapes are exactly those that the manifest declares."""
    expected = shapes(manifest)
    if set(found) != set(expected):
        wanted = " and ".join(repr(name) for name in expected)
        raise InvalidPrefix(
            f"expected the tensor{'s' * (len(expected) > 1)} {wanted}, got {sorted(name[:40] for name in found)[:8]}",
            param="file",
        )
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise InvalidPrefix(f"{name}: expected shape {list(shape)}, got {list(found[name])}", param="file")


def validate(manifest: PrefixManifest, tensors: PrefixTensors) -> None:
    """Raises InvalidPrefix unless the tensors are exactly those the manifest declares, finite and of sane size."""
    check_shapes(manifest, {name: tensor.shape for name, tensor in tensors.items()})
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise InvalidPrefix(f"{name}: expected float32, float16 or bfloat16, got {tensor.dtype}", param="file")
        if not is_within(tensor, LARGEST):
            raise InvalidPrefix(f"{name}: every value must be finite and at most {LARGEST:g} in size", param="file")


def is_within(tensor: torch.Tensor, largest: float) -> bool:
    """Whether every number is at most so large, either way, and none is NaN. One pass that makes no copy."""
    low, high = torch.aminmax(tensor)  # each is NaN if there is one, and fails its comparison
    return -largest <= low.item() and high.item() <= largest


def check_fits(manifest: PrefixManifest, geometry: ModelGeometry, base_digest: str, context_length: int) -> None:
    """Raises PrefixMismatch unless a prefix with this manifest may be served on the given model."""
    different = geometry.differences(manifest.geometry)
    if different:
        raise PrefixMismatch("the prefix does not fit this model: " + "; ".join(different), param="file")
    if manifest.method is Method.PREFIX_PLUS and geometry.encoder is not None:
        raise PrefixMismatch("prefix_plus is not defined for an encoder-decoder model", param="file")
    if manifest.base_digest not in (None, base_digest):
        raise PrefixMismatch(
            f"the prefix was made for another base model: expected base_digest {base_digest[:12]}…, "
            f"got {str(manifest.base_digest)[:12]}…",
            param="file",
        )
    if manifest.virtual_tokens + 2 > context_length:
        raise PrefixMismatch(
            f"{manifest.virtual_tokens} virtual tokens leave no room in a context of {context_length}",
            param="file",
        )
