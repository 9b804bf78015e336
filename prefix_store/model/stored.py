"""A stored prefix, by its manifest, as the reference takes it."""

from __future__ import annotations

import torch

from prefix_store.model import apply
from prefix_store.model.apply import PrefixRows
from prefix_store.model.frozen import FrozenModel
from prefix_store.model.memory import Memory
from prefix_store.prefix import Method, PrefixManifest, Window
from prefix_store.tensors import PAYLOADS, PrefixTensors


@torch.no_grad()
def kv_of(frozen: FrozenModel, manifest: PrefixManifest, tensors: PrefixTensors) -> torch.Tensor:
    """Canonical KV `[L, 2, Hkv, P, D]` in float32 on the model's device; a soft prompt's is made by the model.

    A memory has none: its P is 0.
    """
    tensor = tensors[PAYLOADS[manifest.method]].to(frozen.device)
    if manifest.method is Method.PROMPT:
        return apply.prefill_embeds(frozen, tensor)
    if manifest.method is Method.PREFIX_PLUS:
        layers, two, heads, dim = frozen.geometry.kv_shape
        return torch.zeros(layers, two, heads, 0, dim, device=frozen.device)
    return tensor.float()


def rows_of(frozen: FrozenModel, manifest: PrefixManifest, tensors: PrefixTensors, kv: torch.Tensor) -> PrefixRows:
    """One row of the prefix, whose KV is `kv_of`'s."""
    memory = None
    if manifest.method is Method.PREFIX_PLUS:
        assert manifest.feature_map is not None  # the manifest's own check
        memory = Memory(tensors[PAYLOADS[manifest.method]].to(frozen.device), manifest.feature_map)
    return PrefixRows.stack([kv], [manifest.position_offset], [manifest.window], [memory])


def without(kv: torch.Tensor, manifest: PrefixManifest, removed: torch.Tensor) -> PrefixRows:
    """Rows that do not see virtual token `removed` `[B]`, or that see all of them where it is -1; nothing moves."""
    length, rows = kv.shape[3], len(removed)
    return PrefixRows(
        kv=kv.expand(rows, *kv.shape),
        valid=torch.arange(length, device=kv.device) != removed[:, None],
        offset=torch.full((rows,), manifest.position_offset, device=kv.device),
        slides=torch.full((rows,), manifest.window is Window.SLIDES, device=kv.device),
        lengths=torch.full((rows,), length, device=kv.device),
    )
