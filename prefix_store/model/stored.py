"""A stored prefix, by its manifest, as the reference takes it."""

from __future__ import annotations

import torch

from prefix_store.errors import ModelUnsupported
from prefix_store.model import apply
from prefix_store.model.apply import PrefixRows
from prefix_store.model.frozen import FrozenModel
from prefix_store.model.memory import Memory
from prefix_store.model.rows import Rows, StackRows
from prefix_store.prefix import Method, PrefixManifest, Window
from prefix_store.tensors import PAYLOADS, STACKS, PrefixTensors


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


def repeated(frozen: FrozenModel, manifest: PrefixManifest, tensors: PrefixTensors, count: int) -> Rows:
    """The prefix for every of `count` rows, of a model of either kind."""
    if frozen.is_encoder_decoder:
        return _stacks_of(frozen, manifest, tensors, count)
    row = rows_of(frozen, manifest, tensors, kv_of(frozen, manifest, tensors))
    return PrefixRows(
        kv=row.kv.expand(count, *row.kv.shape[1:]),
        valid=row.valid.expand(count, -1),
        offset=row.offset.expand(count),
        slides=row.slides.expand(count),
        memories=row.memories * count,
    )


def _stacks_of(frozen: FrozenModel, manifest: PrefixManifest, tensors: PrefixTensors, count: int) -> StackRows:
    """Of an encoder-decoder model. Raises ModelUnsupported for a memory, which such a model has no place for yet."""
    if manifest.method is Method.PREFIX_PLUS:
        raise ModelUnsupported("a memory cannot be used in an encoder-decoder model yet")
    if manifest.method is Method.PROMPT:
        return StackRows.prompt(tensors[PAYLOADS[Method.PROMPT]].to(frozen.device).float(), count)
    kvs = {stack: tensors[STACKS[stack]].to(frozen.device).float() for stack in manifest.stacks}
    return StackRows.shared(kvs, count, manifest.position_offset)


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
