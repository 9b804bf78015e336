"""Attention of a packed step as two Triton kernels; `triton` launches them.

`attend_tiles` takes work items as they lie on the device and gives partial results, `merge_parts` merges a row's two by
log-sum-exp and adds what its memory gives. Neither asks the host for anything but shapes: of the list, of the step.

A program of `attend_tiles` is one tile of one item's queries under one kv head, and finds out itself which, from the
number of tiles of the items before. So launches depend on no item's length, an item without queries costs nothing, and
so does padding. A tile's rows are queries times the heads of their group: each key is read once for all of them.
However long an interval of keys is, one program reads it from end to end.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens", "items", "window", "reach"])
def attend_tiles(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    work: tl.tensor,
    bias: tl.tensor,
    partial: tl.tensor,
    lse: tl.tensor,
    query_token: int,  # strides
    query_head: int,
    tokens: int,
    items: int,
    window: int,
    scale: float,
    softcap: float,
    reach: int,
    ITEMS: tl.constexpr,  # a power of two, `items` or more
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a kv head
    SIZE: tl.constexpr,  # D
    WIDTH: tl.constexpr,  # a power of two, D or more
    ROWS: tl.constexpr,  # of a tile
    KEYS: tl.constexpr,  # at a time
    HAS_SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDEN: tl.constexpr,  # operands to float32
) -> None:
    """Partial results `[2, T, Hq, D]` and their log-sum-exps `[2, T, Hq]`, by part, of the rows that items name."""
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    TILE: tl.constexpr = ROWS // GROUP  # queries of a tile

    number = tl.arange(0, ITEMS)
    begins = tl.load(work + 8 * number + 2, mask=number < items, other=0).to(tl.int32)
    ends = tl.load(work + 8 * number + 3, mask=number < items, other=0).to(tl.int32)
    tiles = (ends - begins + TILE - 1) // TILE
    item = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    if item >= items:
        return
    begin = TILE * (tile - tl.sum(tl.where(number < item, tiles, 0), 0))

    part = tl.load(work + 8 * item).to(tl.int32)
    mask = tl.load(work + 8 * item + 1).to(tl.int32)
    q_lo = tl.load(work + 8 * item + 2).to(tl.int32)
    q_hi = tl.load(work + 8 * item + 3).to(tl.int32)
    kv_lo = tl.load(work + 8 * item + 4).to(tl.int32)
    kv_hi = tl.load(work + 8 * item + 5).to(tl.int32)
    q_pos = tl.load(work + 8 * item + 6).to(tl.int32)
    kv_pos = tl.load(work + 8 * item + 7).to(tl.int32)

    row, lane, column = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, KEYS)
    token = q_lo + begin + row // GROUP
    head = kv_head * GROUP + row % GROUP
    live = (row < TILE * GROUP) & (token < q_hi)
    inside = lane < SIZE
    place = q_pos - kv_pos + begin + row // GROUP  # counted from the item's first key
    q = tl.load(
        query + token[:, None].to(tl.int64) * query_token + head[:, None] * query_head + lane[None],
        mask=live[:, None] & inside[None],
        other=0.0,
    )
    if WIDEN:
        q = q.to(tl.float32)

    # Which distances from query to key are seen, and the keys that no query of the tile sees: those are not read.
    far = kv_hi - kv_lo + tokens + tl.abs(q_pos - kv_pos) + 1  # further than anything is off
    least, most = tl.where(mask == 0, -far, 0), tl.where(mask == 2, window, far)
    last = q_pos - kv_pos + tl.minimum(begin + TILE, q_hi - q_lo) - 1
    count = tl.minimum(kv_hi - kv_lo, last - least + 1)
    start = tl.maximum(q_pos - kv_pos + begin - most + 1, 0) // KEYS * KEYS

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(start, count, KEYS):
        key = first + column
        listed = key < count
        at = (kv_lo + key).to(tl.int64) * (KV_HEADS * SIZE) + kv_head * SIZE
        k = tl.load(keys + at[None] + lane[:, None], mask=listed[None] & inside[:, None], other=0.0)
        v = tl.load(values + at[:, None] + lane[None], mask=listed[:, None] & inside[None], other=0.0)
        scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale
        if HAS_SOFTCAP:
            # tanh(x), which the interpreter lacks, as (1 - e^-2|x|) / (1 + e^-2|x|) with the sign of x
            decay = tl.exp(-2.0 * tl.abs(scores) / softcap)
            bent = softcap * (1.0 - decay) / (1.0 + decay)
            scores = tl.where(scores < 0, -bent, bent)
        distance = place[:, None] - key[None]
        if HAS_BIAS:
            clamped = tl.minimum(tl.maximum(distance, -reach), reach)
            scores += tl.load(bias + head[:, None] * (2 * reach + 1) + reach - clamped)
        seen = listed[None] & (distance >= least) & (distance < most)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
        weights = tl.exp(scores - base[:, None])
        fade = tl.exp(top - base)
        total = total * fade + tl.sum(weights, 1)
        sums = sums * fade[:, None] + tl.dot(weights.to(v.dtype).to(q.dtype), v.to(q.dtype), input_precision="ieee")
        top = higher

    empty = total == 0.0  # false for what is no number, which shall be seen in the output
    divisor = tl.where(empty, 1.0, total)
    to = (part * tokens + token).to(tl.int64) * (KV_HEADS * GROUP) + head
    tl.store(partial + to[:, None] * SIZE + lane[None], sums / divisor[:, None], mask=live[:, None] & inside[None])
    tl.store(lse + to, tl.where(empty, float("-inf"), top + tl.log(divisor)), mask=live)


@triton.jit(do_not_specialize=["tokens", "count"])
def merge_parts(
    partial: tl.tensor,
    lse: tl.tensor,
    output: tl.tensor,
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    memories: tl.tensor,
    query_token: int,  # strides
    query_head: int,
    tokens: int,
    count: int,  # of memories
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,  # heads of tokens that a program merges
    MEMORIES: tl.constexpr,  # a power of two, `count` or more; 0 where there is none
    ELU: tl.constexpr,  # that feature map's number; what is not it is gelu
) -> None:
    """The output `[T, Hq, D]` of parts `[2, T, Hq, D]`; a row that no item names gives zeros."""
    row, lane = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    end = tokens * HEADS
    live, inside = row < end, lane < SIZE
    nothing = float("-inf")
    own_lse = tl.load(lse + row, mask=live, other=nothing)
    other_lse = tl.load(lse + end + row, mask=live, other=nothing)
    top = tl.maximum(own_lse, other_lse)
    base = tl.where(top == nothing, 0.0, top)
    own_weight, other_weight = tl.exp(own_lse - base), tl.exp(other_lse - base)
    total = own_weight + other_weight
    divisor = tl.where(total == 0.0, 1.0, total)
    # A part that no item has written holds whatever was in memory: of that nothing is read.
    at = row[:, None] * SIZE + lane[None]
    own = tl.load(partial + at, mask=(own_lse != nothing)[:, None] & inside[None], other=0.0)
    other = tl.load(partial + end * SIZE + at, mask=(other_lse != nothing)[:, None] & inside[None], other=0.0)
    merged = own * (own_weight / divisor)[:, None] + other * (other_weight / divisor)[:, None]
    if MEMORIES > 0:
        token, head = row // HEADS, row % HEADS
        number = 4 * tl.arange(0, MEMORIES)
        listed = number < 4 * count
        q_lo = tl.load(memories + number, mask=listed, other=0)
        q_hi = tl.load(memories + number + 1, mask=listed, other=0)
        slots = tl.load(memories + number + 2, mask=listed, other=0)
        maps = tl.load(memories + number + 3, mask=listed, other=0)
        named = (q_lo[None] <= token[:, None]) & (token[:, None] < q_hi[None]) & live[:, None]
        slot = tl.sum(tl.where(named, slots[None], 0), 1)
        is_elu = tl.sum(tl.where(named, maps[None], 0), 1) == ELU
        has = tl.sum(named.to(tl.int32), 1) > 0
        # Which half of the heads lies among the keys and which among the values: see `kv_pool.memory_halves`.
        FIRST: tl.constexpr = (HEADS + 1) // 2
        in_keys, in_values = has & (head < FIRST), has & (head >= FIRST)
        matrix = slot * (KV_HEADS * SIZE) + tl.where(head < FIRST, head, head - FIRST) * (SIZE * SIZE)
        asked = query + token * query_token + head * query_head
        for feature in range(0, tl.where(tl.sum(has.to(tl.int32), 0) > 0, SIZE, 0)):
            x = tl.load(asked + feature, mask=has, other=0.0).to(tl.float32)
            elu = tl.where(x > 0.0, x, tl.exp(tl.minimum(x, 0.0)) - 1.0)
            gelu = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
            phi = tl.where(is_elu, elu, gelu).to(keys.dtype.element_ty).to(tl.float32)
            line = (matrix + feature * SIZE)[:, None] + lane[None]
            first = tl.load(keys + line, mask=in_keys[:, None] & inside[None], other=0.0).to(tl.float32)
            second = tl.load(values + line, mask=in_values[:, None] & inside[None], other=0.0).to(tl.float32)
            merged += phi[:, None] * (first + second)
    tl.store(output + at, merged.to(output.dtype.element_ty), mask=live[:, None] & inside[None])
