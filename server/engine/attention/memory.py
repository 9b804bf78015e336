"""What the memories of Prefix-Tuning+ prefixes add to a step's attention, the same for every backend.

An item lets the packed query rows `[q_lo, q_hi)`, of all sequences that share a memory, take it from the pool's slots
from `slot` on: o += phi(q)^T M, one product for each half of the heads; see `prefix_store.model.memory` for what it
means and `kv_pool` for how it lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from prefix_store.model.memory import FEATURE_MAPS
from server.engine.kv_pool import memory_halves
from server.scheduler.plan import Row

NAMES = tuple(FEATURE_MAPS)
# Fewer rows are filled up: MKL adds a product of one to three rows up in another order than one of more, and a row
# should give the same bits however many share its memory.
LEAST_ROWS = 4


@dataclass(frozen=True)
class MemoryItem:
    """One memory of a step; `feature_map` is phi's place in `NAMES`."""

    q_lo: int
    q_hi: int
    slot: int
    feature_map: int

    def as_tuple(self) -> tuple[int, ...]:
        """The item as the operator takes it."""
        return (self.q_lo, self.q_hi, self.slot, self.feature_map)


def memory_items(rows: Sequence[Row]) -> list[MemoryItem]:
    """The memories of packed `rows`; rows that share one should be neighbours."""
    items: list[MemoryItem] = []
    q_lo = 0
    for row in rows:
        q_hi, resident = q_lo + row.count, row.sequence.resident
        if resident is not None and resident.payload.feature_map is not None:
            item = MemoryItem(q_lo, q_hi, resident.extent.start, NAMES.index(resident.payload.feature_map))
            if items and (items[-1].slot, items[-1].q_hi) == (item.slot, q_lo):
                item = replace(item, q_lo=items.pop().q_lo)
            items.append(item)
        q_lo = q_hi
    return items


def add(
    output: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, items: torch.Tensor
) -> None:
    """Adds to a layer's head outputs `[T, Hq, D]`, in place, what its queries `[T, Hq, D]` find in their memories.

    `keys` and `values` `[S, Hkv, D]` are the layer's pool, `items` `[m, 4]` on the host. The product is made in the
    pool's dtype; a row without a memory is not touched.
    """
    for q_lo, q_hi, slot, feature_map in items.tolist():
        features = FEATURE_MAPS[NAMES[feature_map]](query[q_lo:q_hi]).to(keys.dtype).transpose(0, 1)
        count, heads = q_hi - q_lo, query.shape[1]
        if count < LEAST_ROWS:
            features = functional.pad(features, (0, 0, 0, LEAST_ROWS - count))
        first, second = memory_halves(keys, values, slot, heads)
        for half, place in ((first, slice(0, len(first))), (second, slice(len(first), heads))):
            output[q_lo:q_hi, place] += torch.bmm(features[place], half)[:, :count].transpose(0, 1)
