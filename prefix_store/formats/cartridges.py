"""HazyResearch's cartridges (HazyResearch/cartridges): keys and values by layer, the first F tokens apart.

Four lists of L tensors: `fixed_keys` and `fixed_values` `[1, Hkv, F, D]`, frozen in training and possibly no tensors
at all, `trainable_keys` and `trainable_values` `[1, Hkv, P - F, D]` behind them. Keys are rotated already, and real
tokens start at position P.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from prefix_store.errors import InvalidPrefix, PrefixMismatch
from prefix_store.geometry import ModelGeometry
from prefix_store.prefix import Method, PrefixManifest, Window
from prefix_store.tensors import PAYLOADS, PrefixTensors, validate

KINDS = ("keys", "values")
LISTS = frozenset(f"{part}_{kind}" for part in ("fixed", "trainable") for kind in KINDS)


def read(lists: Mapping[str, Sequence[torch.Tensor]], geometry: ModelGeometry) -> tuple[PrefixManifest, PrefixTensors]:
    """The prefix in a cartridge. Raises InvalidPrefix, PrefixMismatch."""
    if set(lists) != LISTS:
        raise InvalidPrefix(
            f"expected {', '.join(sorted(LISTS))}, got {sorted(name[:40] for name in lists)[:8]}", param="file"
        )
    for name, layers in lists.items():
        _check(name, layers, geometry)
    keys, values = (_joined(lists[f"fixed_{kind}"], lists[f"trainable_{kind}"]) for kind in KINDS)
    if keys.shape != values.shape:
        raise InvalidPrefix(
            f"expected keys and values for the same tokens, got {keys.shape[2]} and {values.shape[2]}", param="file"
        )
    length = keys.shape[2]
    manifest = PrefixManifest(Method.PREFIX, geometry, length, position_offset=length, window=Window.SLIDES)
    tensors = {PAYLOADS[Method.PREFIX]: torch.stack([keys, values], dim=1)}
    validate(manifest, tensors)
    return manifest, tensors


def _check(name: str, layers: Sequence[torch.Tensor], geometry: ModelGeometry) -> None:
    """Raises PrefixMismatch unless there is one tensor a layer, `[1, Hkv, n, D]` with one n. Fixed ones may lack."""
    if name.startswith("fixed") and not layers:
        return
    if len(layers) != geometry.layers:
        raise PrefixMismatch(f"{name}: expected {geometry.layers} layers, got {len(layers)}", param="file")
    tokens = layers[0].shape[2] if layers[0].dim() == 4 else "tokens"
    expected = [1, geometry.kv_heads, tokens, geometry.head_dim]
    for index, tensor in enumerate(layers):
        if list(tensor.shape) != expected:
            raise PrefixMismatch(
                f"{name}: expected shape {expected}, got {list(tensor.shape)} in layer {index}", param="file"
            )


def _joined(fixed: Sequence[torch.Tensor], trainable: Sequence[torch.Tensor]) -> torch.Tensor:
    """`[L, Hkv, P, D]`: the fixed tokens stand in front."""
    parts = [torch.cat(list(layers)) for layers in (fixed, trainable) if layers]
    return torch.cat(parts, dim=2)
