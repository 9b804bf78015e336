"""What a prefix means to a frozen model: the plain, differentiable reference that training runs and serving must equal.

A prefix enters through one attention function registered with transformers as `antefix_reference`: its keys and values
stand in front of the row's own, or its memory adds to what the heads give, and nothing else of the model changes. It
rides through the model as the keyword argument `prefix`, so there is no state between calls. A row's first real token
stands at the row's own offset.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

from prefix_store.errors import ModelUnsupported
from prefix_store.model import arguments
from prefix_store.model.frozen import FrozenModel
from prefix_store.model.memory import Memory, recall
from prefix_store.prefix import Window

NAME = "antefix_reference"
LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class PrefixRows:
    """One KV prefix for each row of a batch, padded on the right to the longest, and its memory where it has one.

    `kv` `[B, L, 2, Hkv, P, D]`, keys as they stand in a cache. `valid` `[B, P]`: false on padding. `offset` `[B]`: the
    position of the row's first real token. `slides` `[B]`: whether a sliding window may leave the prefix behind.
    `memories`: one for each row, or none at all. `lengths` `[B]`: `back`, where that is not what `valid` counts because
    slots in its midst are left out.
    """

    kv: torch.Tensor
    valid: torch.Tensor
    offset: torch.Tensor
    slides: torch.Tensor
    memories: tuple[Memory | None, ...] = ()
    lengths: torch.Tensor | None = None

    @classmethod
    def stack(
        cls,
        kvs: Sequence[torch.Tensor],
        offsets: Sequence[int],
        windows: Sequence[Window],
        memories: Sequence[Memory | None] = (),
    ) -> PrefixRows:
        """Rows of prefixes of any lengths, each `[L, 2, Hkv, P, D]`.

        A row without a KV prefix, be it that it has a memory or nothing, has P = 0 and offset 0.
        """
        device, longest = kvs[0].device, max(kv.shape[3] for kv in kvs)
        lengths = torch.tensor([kv.shape[3] for kv in kvs], device=device)
        padded = [torch.nn.functional.pad(kv, (0, 0, 0, longest - kv.shape[3])) for kv in kvs]
        return cls(
            kv=torch.stack(padded),
            valid=torch.arange(longest, device=device) < lengths[:, None],
            offset=torch.tensor(offsets, device=device),
            slides=torch.tensor([window is Window.SLIDES for window in windows], device=device),
            memories=tuple(memories),
        )

    @classmethod
    def shared(cls, kv: torch.Tensor, rows: int, offset: int, window: Window) -> PrefixRows:
        """The same prefix `[L, 2, Hkv, P, D]` for every row, without a copy."""
        device = kv.device
        return cls(
            kv=kv.expand(rows, *kv.shape),
            valid=torch.ones(rows, kv.shape[3], dtype=torch.bool, device=device),
            offset=torch.full((rows,), offset, device=device),
            slides=torch.full((rows,), window is Window.SLIDES, device=device),
        )

    @property
    def back(self) -> torch.Tensor:
        """`[B]`: how far before its first real token each row's prefix begins."""
        return self.valid.sum(1) if self.lengths is None else self.lengths

    def visible(self, real_index: torch.Tensor, sliding_window: int | None) -> torch.Tensor:
        """`[B, T, P]`: which prefix slots each token sees; `real_index` `[B, T]` counts the real tokens before it.

        Slot p of a row that slides is seen by real token i iff (P + i) - p < window, as a cached token would be.
        """
        valid = self.valid[:, None, :].expand(-1, real_index.shape[1], -1)
        if sliding_window is None:
            return valid
        slots = torch.arange(valid.shape[2], device=valid.device)
        distance = (self.back[:, None] + real_index)[:, :, None] - slots
        return valid & ((distance < sliding_window) | ~self.slides[:, None, None])


@dataclass(frozen=True)
class Seen:
    """What one layer's attention saw: `key` and `value` `[B, Hkv, P + T, D]`, `weights` `[B, Hq, T, P + T]`.

    `output` `[B, Hq, T, D]` is the heads' own; memories add `recalled` of the same shape to it.
    """

    layer: int
    key: torch.Tensor
    value: torch.Tensor
    weights: torch.Tensor
    output: torch.Tensor
    recalled: torch.Tensor | None


@dataclass(frozen=True)
class _Forward:
    """What attention is given in one forward; `real_index` `[B, T]` counts the real tokens before each token."""

    prefixes: PrefixRows
    real_index: torch.Tensor
    observer: Callable[[Seen], None] | None = None


class Attends(ABC):
    """What may ride through the model in the place of the plain form: rows that attend in a way of their own."""

    @abstractmethod
    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Query `[B, Hq, T, D]`, key and value `[B, Hkv, T, D]`, without a mask: `[B, T, Hq, D]`."""


def attach(frozen: FrozenModel) -> FrozenModel:
    """Makes every attention of the model the reference's, for good, and returns the same frozen model.

    Raises ModelUnsupported, and changes nothing, unless a probe shows that a prefix reaches every layer.
    """
    before = frozen.model.config._attn_implementation
    if before == NAME:
        return frozen
    if frozen.is_encoder_decoder:
        raise ModelUnsupported(f"{frozen.geometry.family}: encoder-decoder models cannot be trained for yet")
    strange = set(getattr(frozen.model.config.get_text_config(), "layer_types", None) or ()) - LAYER_TYPES
    if strange:
        raise ModelUnsupported(f"layers of type {', '.join(sorted(strange))} cannot take a prefix yet")
    frozen.model.set_attn_implementation(NAME)
    if frozen.model.config._attn_implementation != NAME:
        raise ModelUnsupported(f"{frozen.geometry.family} does not let its attention be replaced")
    try:
        deaf = _deaf_layers(frozen)
        if deaf:
            raise ModelUnsupported(f"{frozen.geometry.family}: a prefix does not reach the attention of layers {deaf}")
    except Exception:
        frozen.model.set_attn_implementation(before)
        raise
    return frozen


@torch.enable_grad()
def _deaf_layers(frozen: FrozenModel) -> list[int]:
    """Layers whose part of a prefix has no influence on the logits; the gradient tells."""
    layers, two, heads, dim = frozen.geometry.kv_shape
    generator = torch.Generator().manual_seed(0)
    kv = torch.randn(layers, two, heads, 2, dim, generator=generator).to(frozen.device).requires_grad_()
    ids = torch.zeros(1, 2, dtype=torch.long, device=frozen.device)
    output = logits(frozen, ids, torch.ones_like(ids), PrefixRows.shared(kv, 1, 2, Window.ALWAYS))
    if not output.requires_grad:
        return list(range(layers))
    (gradient,) = torch.autograd.grad(output.float().logsumexp(-1).sum(), kv)
    return [layer for layer in range(layers) if not gradient[layer].any()]


def logits(
    frozen: FrozenModel, ids: torch.Tensor, real_mask: torch.Tensor, prefixes: PrefixRows | None
) -> torch.Tensor:
    """`[B, T, V]` for `ids` `[B, T]`, padded on either side where `real_mask` `[B, T]` is 0; has gradients."""
    _check_attached(frozen)
    real_index = (real_mask.long().cumsum(1) - 1).clamp(min=0)
    offset = 0 if prefixes is None else prefixes.offset[:, None]
    output = frozen.model(
        input_ids=ids,
        attention_mask=real_mask,
        position_ids=offset + real_index,
        use_cache=False,
        prefix=_Forward(prefixes, real_index) if prefixes is not None else None,
    )
    result: torch.Tensor = output.logits
    return result


@torch.no_grad()
def observe(frozen: FrozenModel, ids: torch.Tensor, prefixes: PrefixRows, observer: Callable[[Seen], None]) -> None:
    """Runs `ids` `[B, T]`, none of them padding, and shows the observer every layer's attention. Makes no logits."""
    _check_attached(frozen)
    real_index = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    frozen.model.base_model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=prefixes.offset[:, None] + real_index,
        use_cache=False,
        prefix=_Forward(prefixes, real_index, observer),
    )


def _check_attached(frozen: FrozenModel) -> None:
    if frozen.model.config._attn_implementation != NAME:
        raise RuntimeError("attach the frozen model to the reference first")


@torch.no_grad()
def prefill_kv(frozen: FrozenModel, ids: Sequence[int]) -> torch.Tensor:
    """Canonical KV `[L, 2, Hkv, P, D]` in float32 of P real tokens at positions 0 to P - 1."""
    return _prefill(frozen, input_ids=torch.tensor([ids], device=frozen.device))


def prefill_embeds(frozen: FrozenModel, embeds: torch.Tensor) -> torch.Tensor:
    """Canonical KV of P virtual tokens in the same places, of input embeddings `[P, E]`; has their gradients."""
    return _prefill(frozen, inputs_embeds=embeds[None].to(frozen.dtype))


def _prefill(frozen: FrozenModel, **inputs: torch.Tensor) -> torch.Tensor:
    # a cache made from the config would keep no more than the window of a sliding layer
    cache: Any = DynamicCache()
    frozen.model(**inputs, past_key_values=cache, use_cache=True)
    return torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]).float()


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    prefix: _Forward | Attends | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention face: query `[B, Hq, T, D]`, key and value `[B, Hkv, S, D]`, added mask `[B, 1, T, S]`.

    Prefix-Tuning (Li & Liang 2021): o = softmax(q [K_prefix; K]^T * scaling) [V_prefix; V], to which a memory adds its
    part. Returns `[B, T, Hq, D]`.
    Raises ModelUnsupported on anything that would change the result and that is not understood here.
    """
    if unknown := arguments.strange(others):
        raise ModelUnsupported(f"the model's attention uses {', '.join(unknown)}, which a prefix cannot share yet")
    layer: int = module.layer_idx  # type: ignore[assignment]
    if isinstance(prefix, Attends):
        own = prefix.attend(layer, query, key, value, scaling=scaling, sliding_window=sliding_window, softcap=softcap)
        return own, None
    if prefix is not None:
        kv = prefix.prefixes.kv[:, layer].to(key.dtype)
        key, value = torch.cat([kv[:, 0], key], dim=2), torch.cat([kv[:, 1], value], dim=2)
        attention_mask = torch.cat([_mask(prefix, sliding_window, attention_mask.dtype), attention_mask], dim=3)
    queries_per_key = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(queries_per_key, dim=1).transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores + attention_mask, dim=-1, dtype=torch.float32).to(query.dtype)
    output = weights @ value.repeat_interleave(queries_per_key, dim=1)
    recalled = (
        recall(prefix.prefixes.memories, layer, query) if prefix is not None and prefix.prefixes.memories else None
    )
    if prefix is not None and prefix.observer is not None:
        prefix.observer(Seen(layer, key, value, weights, output, recalled))
    if recalled is not None:
        output = output + recalled
    return output.transpose(1, 2).contiguous(), None


def _mask(prefix: _Forward, sliding_window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """`[B, 1, T, P]`, added to scores: 0 where a prefix slot is seen."""
    hidden = ~prefix.prefixes.visible(prefix.real_index, sliding_window)
    return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)[:, None]


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, eager_mask)
