"""What a prefix means to a frozen model: the plain, differentiable reference that training runs and serving must equal.

A prefix enters through the one function of `attention.py`, and a row's first real token stands at the row's own offset.
This is for decoder-only models; `both.py` has the same for those with an encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from prefix_store.errors import ModelUnsupported
from prefix_store.geometry import Stack
from prefix_store.model import both
from prefix_store.model.attention import NAME, Ahead, Forward, Seen
from prefix_store.model.frozen import FrozenModel
from prefix_store.model.rows import PrefixRows
from prefix_store.prefix import Window

LAYER_TYPES = {"full_attention", "sliding_attention"}


def attach(frozen: FrozenModel) -> FrozenModel:
    """Makes every attention of the model the reference's, for good, and returns the same frozen model.

    Raises ModelUnsupported, and changes nothing, unless a probe shows that a prefix reaches every layer.
    """
    before = frozen.model.config._attn_implementation
    if before == NAME:
        return frozen
    strange = set(getattr(frozen.model.config.get_text_config(), "layer_types", None) or ()) - LAYER_TYPES
    if strange:
        raise ModelUnsupported(f"layers of type {', '.join(sorted(strange))} cannot take a prefix yet")
    frozen.model.set_attn_implementation(NAME)
    if frozen.model.config._attn_implementation != NAME:
        raise ModelUnsupported(f"{frozen.geometry.family} does not let its attention be replaced")
    try:
        deaf = both.deaf_layers(frozen) if frozen.is_encoder_decoder else _deaf_layers(frozen)
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
    frozen: FrozenModel,
    ids: torch.Tensor,
    real_mask: torch.Tensor,
    prefixes: PrefixRows | None,
    cache: DynamicCache | None = None,
) -> torch.Tensor:
    """`[B, T, V]` for `ids` `[B, T]`, padded on either side where `real_mask` `[B, T]` is 0; has gradients.

    `cache`: of the rows' own tokens that were run before, to which these are added; `real_mask` is then of all of them.
    """
    both.check_attached(frozen)
    real_index = both.real_index(real_mask)[:, -ids.shape[1] :]
    offset = 0 if prefixes is None else prefixes.offset[:, None]
    output = frozen.model(
        input_ids=ids,
        attention_mask=real_mask,
        position_ids=offset + real_index,
        past_key_values=cache,
        use_cache=cache is not None,
        prefix=_forward(prefixes, real_index) if prefixes is not None else None,
    )
    result: torch.Tensor = output.logits
    return result


@torch.no_grad()
def observe(frozen: FrozenModel, ids: torch.Tensor, prefixes: PrefixRows, observer: Callable[[Seen], None]) -> None:
    """Runs `ids` `[B, T]`, none of them padding, and shows the observer every layer's attention. Makes no logits."""
    both.check_attached(frozen)
    real_index = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    frozen.model.base_model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=prefixes.offset[:, None] + real_index,
        use_cache=False,
        prefix=_forward(prefixes, real_index, observer),
    )


def _forward(prefixes: PrefixRows, real_index: torch.Tensor, observer: Callable[[Seen], None] | None = None) -> Forward:
    return Forward({Stack.SELF: Ahead(prefixes, real_index)}, observer)


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
