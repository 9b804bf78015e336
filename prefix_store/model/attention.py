"""The one attention function through which a prefix enters a model; transformers knows it as `antefix_reference`.

A prefix's keys and values stand in front of the row's own, or its memory adds to what the heads give, and nothing else
of the model changes. It rides through the model as the keyword argument `prefix`, so there is no state between calls.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from prefix_store.errors import ModelUnsupported
from prefix_store.geometry import Stack
from prefix_store.model import arguments, sites
from prefix_store.model.memory import recall
from prefix_store.model.rows import PrefixRows

NAME = "antefix_reference"


@dataclass(frozen=True)
class Seen:
    """What one layer's attention saw: `key` and `value` `[B, Hkv, P + S, D]`, `weights` `[B, Hq, T, P + S]`.

    S is T, but for cross-attention, where it is the source's length. `output` `[B, Hq, T, D]` is the heads' own;
    memories add `recalled` of the same shape to it.
    """

    stack: Stack
    layer: int
    key: torch.Tensor
    value: torch.Tensor
    weights: torch.Tensor
    output: torch.Tensor
    recalled: torch.Tensor | None


@dataclass(frozen=True)
class Ahead:
    """What stands before the tokens of one stack's queries.

    `real_index` `[B, T]` counts the real tokens before each token. `bias` `[B, Hq, T, P]` is added to the scores of the
    prefix, in models whose positions are such a bias.
    """

    prefixes: PrefixRows
    real_index: torch.Tensor
    bias: torch.Tensor | None = None

    def added(self, sliding_window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """`[B, 1 or Hq, T, P]`, added to scores: 0 where a prefix slot is seen, or its bias."""
        hidden = ~self.prefixes.visible(self.real_index, sliding_window)
        mask = torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)[:, None]
        return mask if self.bias is None else mask + self.bias.to(dtype)


@dataclass(frozen=True)
class Forward:
    """What attention is given in one forward, by stack; stacks that are absent are as they are without a prefix."""

    stacks: Mapping[Stack, Ahead]
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


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    prefix: Forward | Attends | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention face: query `[B, Hq, T, D]`, key and value `[B, Hkv, S, D]`, added mask `[B, 1, T, S]`.

    Prefix-Tuning (Li & Liang 2021): o = softmax(q [K_prefix; K]^T * scaling) [V_prefix; V], to which a memory adds its
    part. `position_bias` `[1, Hq, T, S]`: T5's, added to the scores of the row's own. Returns `[B, T, Hq, D]`.
    Raises ModelUnsupported on anything that would change the result and that is not understood here.
    """
    if unknown := arguments.strange(others):
        raise ModelUnsupported(f"the model's attention uses {', '.join(unknown)}, which a prefix cannot share yet")
    site = sites.of(module)
    if isinstance(prefix, Attends):
        own = prefix.attend(
            site.layer, query, key, value, scaling=scaling, sliding_window=sliding_window, softcap=softcap
        )
        return own, None
    added = _own(query, key, attention_mask, position_bias)
    ahead = prefix.stacks.get(site.stack) if prefix is not None else None
    if ahead is not None:
        kv = ahead.prefixes.kv[:, site.layer].to(key.dtype)
        key, value = torch.cat([kv[:, 0], key], dim=2), torch.cat([kv[:, 1], value], dim=2)
        added = _beside(ahead.added(sliding_window, added.dtype), added)
    queries_per_key = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(queries_per_key, dim=1).transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores + added, dim=-1, dtype=torch.float32).to(query.dtype)
    output = weights @ value.repeat_interleave(queries_per_key, dim=1)
    memories = ahead.prefixes.memories if ahead is not None else ()
    recalled = recall(memories, site.layer, query) if memories else None
    if prefix is not None and prefix.observer is not None:
        prefix.observer(Seen(site.stack, site.layer, key, value, weights, output, recalled))
    if recalled is not None:
        output = output + recalled
    return output.transpose(1, 2).contiguous(), None


def _own(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, position_bias: torch.Tensor | None
) -> torch.Tensor:
    """`[B, 1 or Hq, T, S]`, added to the scores of the row's own tokens."""
    if mask is None:  # transformers leaves out the one that hides nothing
        mask = query.new_zeros(len(query), 1, query.shape[2], key.shape[2])
    return mask if position_bias is None else mask + position_bias


def _beside(prefix: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """`[B, 1 or Hq, T, P + S]`."""
    heads = max(prefix.shape[1], own.shape[1])
    return torch.cat([part.expand(-1, heads, -1, -1) for part in (prefix, own)], dim=3)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, eager_mask)
