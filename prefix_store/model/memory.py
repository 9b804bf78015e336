"""Prefix-Tuning+ (arXiv 2506.13674): a prefix taken out of the softmax and put beside it, as a matrix for each head.

A head's output becomes o_i = attention(q_i, K, V) + phi(q_i)^T M, with q_i the query as it enters attention, after
rotation. There are no virtual tokens, nothing is shifted, and M = 0 changes nothing at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch.nn import functional

# phi, by the name that a manifest gives it
FEATURE_MAPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"elu": functional.elu, "gelu": functional.gelu}


@dataclass(frozen=True)
class Memory:
    """A prefix's memory: `matrices` `[L, Hq, D, D]`, one for each query head, and the name of its phi."""

    matrices: torch.Tensor
    feature_map: str


def recall(memories: Sequence[Memory | None], layer: int, query: torch.Tensor) -> torch.Tensor:
    """What each row's memory adds to a layer's head outputs: queries `[B, Hq, T, D]` to `[B, Hq, T, D]`.

    The product is made in the memory's own dtype, float32 in training, and cast. Neighbours that share one memory, as
    all rows do in training, share one product and no copy of it.
    """
    parts, first = [], 0
    for _, group in groupby(memories, key=id):
        memory, *others = group
        rows = query[first : first + 1 + len(others)]
        parts.append(_recall(memory, layer, rows) if memory is not None else torch.zeros_like(rows))
        first += len(rows)
    return torch.cat(parts)


def _recall(memory: Memory, layer: int, query: torch.Tensor) -> torch.Tensor:
    features = FEATURE_MAPS[memory.feature_map](query.to(memory.matrices.dtype))
    return torch.einsum("bhtd,hde->bhte", features, memory.matrices[layer]).to(query.dtype)
