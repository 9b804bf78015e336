"""Attention on the CPU: PyTorch's flash kernel on views of the pool, one call an item, nothing gathered."""

from __future__ import annotations

import torch

from server.engine.attention import plain
from server.engine.attention.work import Mask, Part, WorkItem

# The kernel behind F.scaled_dot_product_attention, called directly because only it gives the log-sum-exp.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


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
    """As `plain.attend_item`, which takes over what the kernel has no notion of: soft-caps and unseeing queries."""
    unseeing = item.mask is Mask.WINDOW and item.part is Part.PREFIX
    if softcap or unseeing:
        return plain.attend_item(query, key, value, item, window=window, scale=scale, softcap=softcap, bias=bias)
    group = query.shape[1] // key.shape[1]
    if group > 1 and item.mask is Mask.FULL and bias is None:
        return _grouped(query, key, value, group, scale)
    k, v = key.transpose(0, 1)[None], value.transpose(0, 1)[None]
    if group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    square = item.mask is Mask.CAUSAL and query.shape[0] == key.shape[0] and bias is None
    added = None if square else _added(item, window, query.dtype, bias)
    output, total = _flash(query.transpose(0, 1)[None], k, v, 0.0, square, attn_mask=added, scale=scale)
    return output[0].transpose(0, 1), total[0].transpose(0, 1)


def _grouped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Without a mask the heads of a group are simply further queries of one kv head: keys are read once."""
    count, query_heads, size = query.shape
    kv_heads = query_heads // group
    packed = query.view(count, kv_heads, group, size).transpose(0, 1).reshape(1, kv_heads, count * group, size)
    output, total = _flash(packed, key.transpose(0, 1)[None], value.transpose(0, 1)[None], 0.0, False, scale=scale)
    output = output.view(kv_heads, count, group, size).transpose(0, 1).reshape(count, query_heads, size)
    return output, total.view(kv_heads, count, group).transpose(0, 1).reshape(count, query_heads)


def _added(item: WorkItem, window: int, dtype: torch.dtype, bias: torch.Tensor | None) -> torch.Tensor | None:
    """What is added to scores, `[n, m]` or `[1, Hq, n, m]`."""
    mask = plain.visible(item, window, torch.device("cpu"))
    if bias is not None:
        added = plain.relative(item, bias).to(dtype)[None]
        return added if mask is None else added.masked_fill_(~mask, -torch.inf)
    return None if mask is None else torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)
