"""Attention on a GPU in Triton: all items of a step in one launch, and their merge with what memories add in another.

Nothing here waits for the device, and launches depend on shapes alone: on how many tokens a step has, and on how many
lines its lists have, to the next power of two.

Triton comes with torch's CUDA build and is imported when it is first needed. Where it is not there, cannot compile the
kernels, or does not compute what `plain` computes, there is no such backend.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Any

import torch

from server.engine.attention import memory, plain, segments
from server.engine.attention.work import Mask, Part, WorkItem

LEAST_ROWS, MOST_ROWS = 16, 64  # of a tile: the least that a tensor core takes, and what registers hold at D = 128
KEYS, KEYS_BYTES = (16, 64), 2**14  # least and most at a time; two rounds of keys and values fit into shared memory
LEAST_ITEMS, LEAST_MEMORIES = 64, 16  # a kernel is compiled for each power of two above
MERGED_ROWS = 16
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.004}
_log = logging.getLogger(__name__)


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
    """As `segments.attend` and, where there are `memories`, `memory.add` after it; both lists lie on the device.

    A line whose query interval is empty does nothing. `keys` and `values` are contiguous.
    """
    from server.engine.attention.triton_kernels import attend_tiles, merge_parts

    if query.stride(2) != 1:
        query = query.contiguous()
    tokens, heads, size = query.shape
    kv_heads, items = keys.shape[1], len(work)
    group = heads // kv_heads
    width = max(16, _power(size))
    shape = {"KV_HEADS": kv_heads, "SIZE": size, "WIDTH": width}
    rows = _rows(tokens, items, group)
    at_once = max(KEYS[0], min(KEYS[1], KEYS_BYTES // (width * query.itemsize)))
    partial = torch.empty(len(Part), tokens, heads, size, dtype=torch.float32, device=query.device)
    lse = torch.full(partial.shape[:3], -torch.inf, device=query.device)
    # A query is in two items at most, and each item has less than one tile more than its queries fill.
    tiles = len(Part) * tokens // (rows // group) + items
    attend_tiles[(tiles, kv_heads)](
        query, keys, values, work, bias if bias is not None else lse, partial, lse,
        query.stride(0), query.stride(1), tokens, items, window, scale, softcap,
        bias.shape[1] // 2 if bias is not None else 0,
        ITEMS=max(LEAST_ITEMS, _power(items)), GROUP=group, ROWS=rows, KEYS=at_once,
        HAS_SOFTCAP=softcap != 0, HAS_BIAS=bias is not None,
        WIDEN=query.device.type == "cpu",  # Triton's interpreter multiplies bfloat16's bits as integers
        **shape,
    )  # fmt: skip
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    count = len(memories) if memories is not None else 0
    merge_parts[(-(-tokens * heads // MERGED_ROWS),)](
        partial, lse, output, query, keys, values, memories if memories is not None else work,
        query.stride(0), query.stride(1), tokens, count,
        HEADS=heads, ROWS=MERGED_ROWS, MEMORIES=max(LEAST_MEMORIES, _power(count)) if count else 0,
        ELU=memory.NAMES.index("elu"), **shape,
    )  # fmt: skip
    return output


@functools.cache
def is_available(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Whether this machine can run it on that device, for heads of that dtype and size."""
    if dtype not in TOLERANCES or importlib.util.find_spec("triton") is None:
        return False
    try:
        agrees = _agrees(device, dtype, size)
    except Exception as error:  # whatever a compiler for that very card fails with, `plain` serves
        _log.warning("attention in Triton does not run on %s: %s", device, error)
        return False
    if not agrees:
        _log.warning("attention in Triton computes something else on %s", device)
    return agrees


def _rows(tokens: int, items: int, group: int) -> int:
    """How high tiles are: as an item is on average, for taller ones compute what nobody asked for."""
    average = -(-len(Part) * tokens // items) * group
    return max(LEAST_ROWS, _power(group), min(MOST_ROWS, _power(average)))


def _power(number: int) -> int:
    """The power of two that is `number` or the next above it."""
    return 1 << (number - 1).bit_length()


def _agrees(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Whether it computes what `plain` does: rows that share a prefix, a row without, a stretch of rows, a memory."""
    draws = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draws).to(device, dtype)

    end = 122 + size  # a memory of four heads takes as many slots of two
    query, keys, values = random(42, 4, size), random(end, 2, size), random(end, 2, size)
    items = [WorkItem(Part.OWN, Mask.FULL, row, row + 1, 3 * row, 3 * row + 3, 0, 0) for row in range(3)]
    items.append(WorkItem(Part.OWN, Mask.WINDOW, 3, 42, 9, 48, 0, 0))
    items.append(WorkItem(Part.PREFIX, Mask.FULL, 0, 2, 48, 122, 0, 0))
    items.append(WorkItem(Part.OWN, Mask.FULL, 0, 0, 0, 0, 0, 0))
    work = torch.tensor([item.as_tuple() for item in items])
    memories = torch.tensor([[1 + 3 * number, 4 + 3 * number, 122, number] for number in range(len(memory.NAMES))])
    options: dict[str, Any] = {"window": 30, "scale": 0.1, "softcap": 0.0}
    for bias in (None, random(4, 2 * 5 + 1).float()):
        expected = segments.attend(plain.attend_item, query, keys, values, work[:-1], **options, bias=bias)
        memory.add(expected, query, keys, values, memories)
        found = attend(query, keys, values, work.to(device), **options, bias=bias, memories=memories.to(device))
        worst = (found - expected).abs().max() / expected.abs().max()
        if not worst < TOLERANCES[dtype]:
            return False
    return True
