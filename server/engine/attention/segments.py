"""Runs a list of work items one by one and merges each row's two segments by log-sum-exp."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from server.engine.attention.work import Part, WorkItem

# Outputs `[T, Hq, D]` and log-sum-exps `[T, Hq]`, by part.
Targets = Mapping[Part, tuple[torch.Tensor, torch.Tensor]]


class AttendItem(Protocol):
    """A backend that takes the work item by item; see `plain.attend_item`."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        item: WorkItem,
        *,
        window: int,
        scale: float,
        softcap: float,
        bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output `[n, Hq, D]` and log-sum-exp `[n, Hq]`."""


def attend(
    attend_item: AttendItem,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    work: torch.Tensor,
    *,
    window: int,
    scale: float,
    softcap: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of packed queries `[T, Hq, D]` over one layer's pool `[S, Hkv, D]`; returns `[T, Hq, D]`.

    `work` `[n, 8]`: the items, as integers.
    """
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    # Rows without a prefix keep zeros and minus infinity here, so that merging leaves them as they are.
    prefix_output, prefix_lse = torch.zeros_like(query), torch.full_like(lse, -torch.inf)
    targets = {Part.OWN: (output, lse), Part.PREFIX: (prefix_output, prefix_lse)}
    for item in WorkItem.read(work.tolist()):
        fill(targets, attend_item, query, keys, values, item, window=window, scale=scale, softcap=softcap, bias=bias)
    return merge(output, lse, prefix_output, prefix_lse)


def fill(
    targets: Targets,
    attend_item: AttendItem,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    item: WorkItem,
    **options: Any,
) -> None:
    """Puts one item's partial result where its part is gathered; `options` are `attend_item`'s."""
    rows, slots = slice(item.q_lo, item.q_hi), slice(item.kv_lo, item.kv_hi)
    output, lse = targets[item.part]
    output[rows], lse[rows] = attend_item(query[rows], keys[slots], values[slots], item, **options)


def merge(output: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> torch.Tensor:
    """Attention over two disjoint sets of keys from attention over each.

    `(e^a o + e^b p) / (e^a + e^b) = o + sigmoid(b - a) (p - o)`: exact, and stable for any a and b with a finite.
    """
    weight = torch.sigmoid(other_lse - lse).to(output.dtype)[..., None]
    return torch.lerp(output, other, weight)
