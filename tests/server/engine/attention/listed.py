"""An attention backend that reads its lists where they lie, in plain torch: it never asks the host for a number.

It is what a GPU's backend is to a recorded step, on any machine, and slow: every query is held against every slot.
"""

from __future__ import annotations

import pytest
import torch

from prefix_store.model.memory import FEATURE_MAPS
from server.engine import attention, fused, linear, step_graphs
from server.engine.attention.memory import NAMES
from server.engine.attention.work import Mask

NAME = "listed"


def pretend(monkeypatch: pytest.MonkeyPatch, buckets: tuple[int, ...]) -> None:
    """Gives the CPU what a GPU has: this backend, recorded steps of these sizes, and no kernels that are the CPU's."""
    monkeypatch.setitem(attention.BACKENDS, NAME, attend)
    monkeypatch.setattr(attention, "ON_DEVICE", frozenset({NAME}))
    monkeypatch.setattr(linear, "_works", lambda like: False)
    monkeypatch.setattr(fused, "_library", lambda: None)
    monkeypatch.setattr(step_graphs, "TOKENS", buckets)


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    work: torch.Tensor,
    *,
    window: int,
    scale: float,
    softcap: float,
    bias: torch.Tensor | None = None,
    memories: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `triton.attend`: of `[T, Hq, D]`, over a layer's pool `[S, Hkv, D]`."""
    assert bias is None
    seen = _seen(work, len(query), len(keys), window)
    group = query.shape[1] // keys.shape[1]
    k, v = (pool.repeat_interleave(group, dim=1).transpose(0, 1) for pool in (keys, values))
    scores = query.transpose(0, 1) @ k.transpose(1, 2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0.0)
    output = (weights @ v.masked_fill(~seen.any(0)[:, None], 0.0)).transpose(0, 1).contiguous()
    if memories is not None:
        _add_memories(output, query, keys, values, memories)
    return output


def _seen(work: torch.Tensor, tokens: int, slots: int, window: int) -> torch.Tensor:
    """`[T, S]`: which query sees which slot, by any item."""
    _, mask, q_lo, q_hi, kv_lo, kv_hi, q_pos, kv_pos = work[:, :, None, None].unbind(1)
    query, slot = torch.arange(tokens)[:, None], torch.arange(slots)
    distance = (q_pos + query - q_lo) - (kv_pos + slot - kv_lo)
    allowed = (mask == Mask.FULL) | ((distance >= 0) & ((mask == Mask.CAUSAL) | (distance < window)))
    named = (q_lo <= query) & (query < q_hi) & (kv_lo <= slot) & (slot < kv_hi)
    return (named & allowed).any(0)


def _add_memories(
    output: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, memories: torch.Tensor
) -> None:
    heads, size = query.shape[1:]
    q_lo, q_hi, slot, feature_map = memories.unbind(1)
    token = torch.arange(len(query))
    named = (q_lo[:, None] <= token) & (token < q_hi[:, None])  # [m, T]
    first = (heads + 1) // 2
    halves = ((keys, slice(0, first)), (values, slice(first, heads)))
    for pool, place in halves:
        count = (place.stop - place.start) * size * size
        begins = slot * pool[0].numel()
        matrices = pool.flatten()[begins[:, None] + torch.arange(count)].view(len(slot), -1, size, size)
        for number, name in enumerate(NAMES):
            chosen = (named & (feature_map == number)[:, None]).to(query.dtype)
            found = torch.einsum("thd,mhde->mthe", FEATURE_MAPS[name](query[:, place]), matrices)
            output[:, place] += torch.einsum("mt,mthe->the", chosen, found)
