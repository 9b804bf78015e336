"""A prefix's numbers in their canonical layouts, and the check that they are what the manifest says."""

from __future__ import annotations

import torch

from prefix_store.errors import InvalidPrefix, PrefixMismatch
from prefix_store.geometry import ModelGeometry
from prefix_store.prefix import Method, PrefixManifest

# tensor name in the native file, by method
PAYLOADS = {
    Method.PREFIX: "self.kv",
    Method.TEXT: "self.kv",
    Method.PROMPT: "embeds",
    Method.PREFIX_PLUS: "memory",
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Far above anything attention can use, far below what overflows a product in float32.
LARGEST = 1e6

PrefixTensors = dict[str, torch.Tensor]


def payload_shape(manifest: PrefixManifest) -> tuple[int, ...]:
    """Canonical shape: KV `[L, 2, Hkv, P, D]`, embeds `[P, E]`, memory `[L, Hq, D, D]`."""
    geometry, length = manifest.geometry, manifest.virtual_tokens
    if manifest.method is Method.PROMPT:
        return length, geometry.hidden_size
    if manifest.method is Method.PREFIX_PLUS:
        return geometry.layers, geometry.query_heads, geometry.head_dim, geometry.head_dim
    return geometry.layers, 2, geometry.kv_heads, length, geometry.head_dim


def validate(manifest: PrefixManifest, tensors: PrefixTensors) -> None:
    """Raises InvalidPrefix unless the tensors are exactly those the manifest declares, finite and of sane size."""
    name = PAYLOADS[manifest.method]
    if set(tensors) != {name}:
        raise InvalidPrefix(
            f"expected the tensor {name!r}, got {sorted(key[:40] for key in tensors)[:8]}", param="file"
        )
    tensor, expected = tensors[name], payload_shape(manifest)
    if tuple(tensor.shape) != expected:
        raise InvalidPrefix(f"{name}: expected shape {list(expected)}, got {list(tensor.shape)}", param="file")
    if tensor.dtype not in DTYPES:
        raise InvalidPrefix(f"{name}: expected float32, float16 or bfloat16, got {tensor.dtype}", param="file")
    # chunks bound the memory of the check; NaN fails the comparison as well
    for chunk in tensor.flatten().split(1 << 22):
        if not bool((chunk.abs() <= LARGEST).all()):
            raise InvalidPrefix(f"{name}: every value must be finite and at most {LARGEST:g} in size", param="file")


def check_fits(manifest: PrefixManifest, geometry: ModelGeometry, base_digest: str, context_length: int) -> None:
    """Raises PrefixMismatch unless a prefix with this manifest may be served on the given model."""
    different = geometry.differences(manifest.geometry)
    if different:
        raise PrefixMismatch("the prefix does not fit this model: " + "; ".join(different), param="file")
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
