"""Attention in plain products and sums: runs on every device, and is what faster backends are tested against."""

from __future__ import annotations

import torch

from server.engine.attention.work import Mask, WorkItem


def attend_item(
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
    """One item: query `[n, Hq, D]`, key and value `[m, Hkv, D]`.

    Returns the output `[n, Hq, D]` and the log-sum-exp of the scores `[n, Hq]` in float32; a query that sees nothing
    gives zeros and minus infinity. `softcap` 0 means none; else scores become `softcap * tanh(scores / softcap)`
    (Gemma 2, arXiv 2408.00118, section 2). `bias`: see `relative`.
    """
    count, query_heads, size = query.shape
    kv_heads = key.shape[1]
    grouped = query.float().view(count, kv_heads, query_heads // kv_heads, size)
    scores = torch.einsum("ngrd,mgd->grnm", grouped, key.float()) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores += relative(item, bias).unflatten(0, scores.shape[:2])
    if (mask := visible(item, window, query.device)) is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    total = scores.logsumexp(-1)
    weights = torch.exp(scores - total.clamp_min(torch.finfo(torch.float32).min)[..., None])
    output = torch.einsum("grnm,mgd->ngrd", weights, value.float())
    return output.reshape(count, query_heads, size).to(query.dtype), total.permute(2, 0, 1).reshape(count, query_heads)


def visible(item: WorkItem, window: int, device: torch.device) -> torch.Tensor | None:
    """`[queries, keys]`, True where the query may see the key; None where every query sees every key."""
    if item.mask is Mask.FULL:
        return None
    distance = _distance(item, device)
    return (distance >= 0) & (distance < window) if item.mask is Mask.WINDOW else distance >= 0


def relative(item: WorkItem, bias: torch.Tensor) -> torch.Tensor:
    """`[Hq, queries, keys]`, float32: what a relative position adds to a score (T5: Raffel et al. 2020, section 2.1).

    `bias` `[Hq, 2 R + 1]` is by how far behind the query the key is, from R before it to R behind; all that is further
    off counts as that far.
    """
    reach = bias.shape[1] // 2
    return bias[:, reach - _distance(item, bias.device).clamp(-reach, reach)]


def _distance(item: WorkItem, device: torch.device) -> torch.Tensor:
    """`[queries, keys]`: how far before the query the key is."""
    queries = torch.arange(item.q_pos, item.q_pos + item.q_hi - item.q_lo, device=device)
    keys = torch.arange(item.kv_pos, item.kv_pos + item.kv_hi - item.kv_lo, device=device)
    return queries[:, None] - keys[None]
