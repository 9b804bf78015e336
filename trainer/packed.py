"""The rows of any number of prefixes in one sequence, without padding, and the attention that keeps them apart.

Everything but attention goes token by token, so a frozen layer takes all rows in one product. Rows of one length
behind prefixes of one width are a bucket: they lie side by side and attend in one call of torch's kernel.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby

import torch
from torch.nn import functional

from prefix_store.model.attention import Attends
from prefix_store.model.memory import Memory, recall
from prefix_store.model.rows import PrefixRows


@dataclass(frozen=True)
class Row:
    """The tokens of an example, and which row of `prefixes` stands before it; None is the bare model."""

    ids: Sequence[int]
    prefixes: PrefixRows | None
    index: int

    @property
    def width(self) -> int:
        """Slots of its prefix, padding included."""
        return 0 if self.prefixes is None else self.prefixes.kv.shape[4]

    @property
    def memory(self) -> Memory | None:
        """Of its prefix, where that has one."""
        return self.prefixes.memories[self.index] if self.prefixes is not None and self.prefixes.memories else None


@dataclass(frozen=True)
class Packed:
    """Rows one after another: `ids` and `positions` `[1, T]`, and where each row, in the order given, begins."""

    ids: torch.Tensor
    positions: torch.Tensor
    starts: tuple[int, ...]
    buckets: tuple[Bucket, ...]


def pack(rows: Sequence[Row], device: torch.device) -> Packed:
    """Puts rows that can attend together beside one another."""
    alike: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        alike[row.width, len(row.ids)].append(number)
    order = list(chain.from_iterable(alike.values()))
    starts, end = [0] * len(rows), 0
    for number in order:
        starts[number], end = end, end + len(rows[number].ids)
    first = _first_positions(rows)
    ids = chain.from_iterable(rows[number].ids for number in order)
    positions = chain.from_iterable(range(first[number], first[number] + len(rows[number].ids)) for number in order)
    return Packed(
        torch.tensor([list(ids)], device=device),
        torch.tensor([list(positions)], device=device),
        tuple(starts),
        tuple(Bucket([rows[number] for number in numbers]) for numbers in alike.values()),
    )


def _first_positions(rows: Sequence[Row]) -> list[int]:
    offsets = {id(row.prefixes): row.prefixes.offset.tolist() for row in rows if row.prefixes is not None}
    return [offsets[id(row.prefixes)][row.index] if row.prefixes is not None else 0 for row in rows]


class Bucket:
    """Rows of one length behind prefixes of one width, side by side."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.count, self.length = len(rows), len(rows[0].ids)
        memories = tuple(row.memory for row in rows)
        self._memories = memories if any(memory is not None for memory in memories) else ()
        self._prefixes = _joined(rows) if rows[0].width else None
        # all layers at once: the gradients of single ones would each be as large as the whole
        self._layers = self._prefixes.kv.unbind(1) if self._prefixes is not None else ()
        self._masks: dict[int | None, torch.Tensor | None] = {}

    @property
    def tokens(self) -> int:
        """Of all its rows."""
        return self.count * self.length

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Queries `[Hq, B T, D]`, keys and values `[Hkv, B T, D]` of its rows to `[B T, Hq, D]`."""
        given = query.dtype
        query, key, value = (x.unflatten(1, (self.count, self.length)).transpose(0, 1) for x in (query, key, value))
        if query.device.type == "cpu":  # whose kernel takes three times as long in half precision, going backward
            query, key, value = query.float(), key.float(), value.float()
        if self._layers:
            kv = self._layers[layer].to(key.dtype)
            key, value = torch.cat([kv[:, 0], key], dim=2), torch.cat([kv[:, 1], value], dim=2)
        if (group := query.shape[1] // key.shape[1]) > 1:
            key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        mask = self._mask(window, query)
        if softcap is None:
            output = functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling
            )
        else:
            output = _capped(query, key, value, mask, scaling, softcap)
        if self._memories:
            output = output + recall(self._memories, layer, query)
        return output.transpose(1, 2).flatten(0, 1).to(given)

    def _mask(self, window: int | None, like: torch.Tensor) -> torch.Tensor | None:
        """`[B or 1, 1, T, P + T]`, added to scores; None where a row sees itself and all that stands before it."""
        if window not in self._masks:
            self._masks[window] = self._made_mask(window, like)
        return self._masks[window]

    def _made_mask(self, window: int | None, like: torch.Tensor) -> torch.Tensor | None:
        if self._prefixes is None and (window is None or window >= self.length):
            return None
        index = torch.arange(self.length, device=like.device)
        distance = index[:, None] - index
        seen = ((distance >= 0) & (distance < (window or self.length))).expand(self.count, -1, -1)
        if self._prefixes is not None:
            seen = torch.cat([self._prefixes.visible(index.expand(self.count, -1), window), seen], dim=2)
        if bool((seen == seen[:1]).all()):
            seen = seen[:1]
        return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, -torch.inf)[:, None]


def _capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float,
) -> torch.Tensor:
    """Scores become `softcap * tanh(scores / softcap)` (Gemma 2, arXiv 2408.00118, section 2)."""
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scaling / softcap)
    if mask is None:
        mask = torch.full(scores.shape[2:], -torch.inf, dtype=scores.dtype, device=scores.device).triu(1)
    return torch.softmax(scores + mask, dim=-1, dtype=torch.float32).to(query.dtype) @ value


def _joined(rows: Sequence[Row]) -> PrefixRows:
    """The prefixes of the rows, one for each, all of one width."""
    parts = [_selected(list(run)) for _, run in groupby(rows, key=lambda row: id(row.prefixes))]
    if len(parts) == 1:
        return parts[0]
    return PrefixRows(
        kv=torch.cat([part.kv for part in parts]),
        valid=torch.cat([part.valid for part in parts]),
        offset=torch.cat([part.offset for part in parts]),
        slides=torch.cat([part.slides for part in parts]),
        lengths=torch.cat([part.back for part in parts]),
    )


def _selected(rows: Sequence[Row]) -> PrefixRows:
    """Of rows that have the same `prefixes`."""
    prefixes, indices = rows[0].prefixes, [row.index for row in rows]
    assert prefixes is not None
    if indices == list(range(len(prefixes.kv))):
        return prefixes
    is_shared = prefixes.kv.stride(0) == 0
    return PrefixRows(
        kv=prefixes.kv[:1].expand(len(indices), *prefixes.kv.shape[1:]) if is_shared else prefixes.kv[indices],
        valid=prefixes.valid[indices],
        offset=prefixes.offset[indices],
        slides=prefixes.slides[indices],
        lengths=prefixes.back[indices],
    )


class PackedForward(Attends):
    """What attention is given in a packed forward; `recompute`: layers keep nothing for the backward pass."""

    def __init__(self, buckets: Sequence[Bucket], *, recompute: bool) -> None:
        self._buckets = buckets
        self.recompute = recompute

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
        """Every bucket by itself; a batch of one row that holds them all, `[1, T, Hq, D]`."""
        outputs, first = [], 0
        for bucket in self._buckets:
            part = slice(first, first + bucket.tokens)
            parts = (x[0, :, part] for x in (query, key, value))
            outputs.append(bucket.attend(layer, *parts, scaling=scaling, window=sliding_window, softcap=softcap))
            first += bucket.tokens
        return torch.cat(outputs)[None] if len(outputs) > 1 else outputs[0][None]
