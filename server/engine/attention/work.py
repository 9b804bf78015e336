"""The attention of one step as a list of work items, the same for every backend.

An item lets the packed query rows `[q_lo, q_hi)` attend to the pool slots `[kv_lo, kv_hi)`. Each query row has exactly
one item of part OWN and at most one of part PREFIX; the two partial results merge by log-sum-exp. `q_pos` and `kv_pos`
are the places of the first query and the first key in the row's whole sequence, virtual tokens included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

from prefix_store.geometry import Stack
from server.scheduler.plan import Row
from server.scheduler.slots import Extent


class Part(IntEnum):
    """Which partial result an item gives."""

    OWN = 0
    PREFIX = 1


class Mask(IntEnum):
    """FULL: every key. CAUSAL: keys at or before the query. WINDOW: causal and nearer than the window."""

    FULL = 0
    CAUSAL = 1
    WINDOW = 2


# The numbers of an item, in the order in which the operator takes them.
FIELDS = ("part", "mask", "q_lo", "q_hi", "kv_lo", "kv_hi", "q_pos", "kv_pos")


@dataclass(frozen=True)
class WorkItem:
    """One line of the list."""

    part: Part
    mask: Mask
    q_lo: int
    q_hi: int
    kv_lo: int
    kv_hi: int
    q_pos: int
    kv_pos: int

    def as_tuple(self) -> tuple[int, ...]:
        """The item as the operator takes it: `FIELDS`."""
        return (self.part, self.mask, self.q_lo, self.q_hi, self.kv_lo, self.kv_hi, self.q_pos, self.kv_pos)

    @classmethod
    def read(cls, lines: Sequence[Sequence[int]]) -> list[WorkItem]:
        """Items from what `as_tuple` made of them."""
        return [cls(Part(line[0]), Mask(line[1]), *line[2:]) for line in lines]


def work_items(rows: Sequence[Row], window: int | None, *, relative: bool = False) -> list[WorkItem]:
    """The items of packed `rows` for layers with this sliding window (None: they see everything).

    Rows that share a prefix should be neighbours: then it is read once for all of them, unless positions are `relative`
    so that each sees it from a place of its own.
    """
    own: list[WorkItem] = []
    prefixes: list[WorkItem] = []
    q_lo = 0
    for row in rows:
        own.append(_own(row, q_lo, window))
        _add(prefixes, _prefix(row, q_lo, window), relative)
        q_lo += row.count
    return own + prefixes


def cross_items(rows: Sequence[Row]) -> list[WorkItem]:
    """The items of the cross-attention of packed `rows`, which see their sources whole; places are of no account."""
    own: list[WorkItem] = []
    prefixes: list[WorkItem] = []
    q_lo = 0
    for row in rows:
        q_hi = q_lo + row.count
        own.append(_full(Part.OWN, q_lo, q_hi, row.sequence.source))
        _add(prefixes, _prefix_of(row, Stack.CROSS, q_lo, q_hi, 0), relative=False)
        q_lo = q_hi
    return own + prefixes


def encoder_items(rows: Sequence[Row], *, relative: bool = False) -> list[WorkItem]:
    """The items of the encoder's pass over the packed sources of `rows`, each of which sees the whole of its own."""
    own: list[WorkItem] = []
    prefixes: list[WorkItem] = []
    q_lo = 0
    for row in rows:
        q_hi = q_lo + row.sequence.source_length
        own.append(_full(Part.OWN, q_lo, q_hi, row.sequence.source))
        length = row.sequence.resident.payload.virtual_tokens if row.sequence.resident is not None else 0
        _add(prefixes, _prefix_of(row, Stack.ENCODER, q_lo, q_hi, length), relative)
        q_lo = q_hi
    return own + prefixes


def prefill_item(extent: Extent, window: int) -> WorkItem:
    """Tokens that fill an extent from position 0 on and see nothing else; `window` 0 is none."""
    mask = Mask.WINDOW if window and extent.size > window else Mask.CAUSAL
    return WorkItem(Part.OWN, mask, 0, extent.size, extent.start, extent.end, 0, 0)


def _own(row: Row, q_lo: int, window: int | None) -> WorkItem:
    extent = row.sequence.extent
    assert extent is not None
    virtual = _virtual(row)
    end = row.end
    # Indices below `first` are out of every query's sight.
    first = max(0, row.start - window + 1) if window is not None else 0
    mask = Mask.WINDOW if window is not None and end > window else Mask.CAUSAL
    return WorkItem(
        Part.OWN,
        mask if row.count > 1 else Mask.FULL,
        q_lo,
        q_lo + row.count,
        extent.start + first,
        extent.start + end,
        virtual + row.start,
        virtual + first,
    )


def _prefix(row: Row, q_lo: int, window: int | None) -> WorkItem | None:
    resident, virtual = row.sequence.resident, _virtual(row)
    if resident is None or not virtual:
        return None  # a memory is no tokens to attend to; see `memory`
    start = resident.extent.start
    first, mask = 0, Mask.FULL
    if window is not None and resident.payload.slides:
        first = max(0, virtual + row.start - window + 1)
        if first >= virtual:
            return None
        if virtual + row.end > window and row.count > 1:
            mask = Mask.WINDOW
    return WorkItem(
        Part.PREFIX, mask, q_lo, q_lo + row.count, start + first, start + virtual, virtual + row.start, first
    )


def _full(part: Part, q_lo: int, q_hi: int, extent: Extent | None, q_pos: int = 0) -> WorkItem:
    assert extent is not None
    return WorkItem(part, Mask.FULL, q_lo, q_hi, extent.start, extent.end, q_pos, q_pos if part is Part.OWN else 0)


def _prefix_of(row: Row, stack: Stack, q_lo: int, q_hi: int, q_pos: int) -> WorkItem | None:
    """For queries that see a stack's prefix whole, the first of them at `q_pos`."""
    resident = row.sequence.resident
    extent = resident.extent_of(stack) if resident is not None else None
    return None if extent is None else _full(Part.PREFIX, q_lo, q_hi, extent, q_pos)


def _add(prefixes: list[WorkItem], item: WorkItem | None, relative: bool) -> None:
    if item is not None and prefixes and not relative and _continues(prefixes[-1], item):
        prefixes[-1] = replace(prefixes[-1], q_hi=item.q_hi)
    elif item is not None:
        prefixes.append(item)


def _continues(last: WorkItem, item: WorkItem) -> bool:
    """Whether the item's queries adjoin the last one's and see the same slots, all of them."""
    same_slots = (last.kv_lo, last.kv_hi) == (item.kv_lo, item.kv_hi)
    return same_slots and last.q_hi == item.q_lo and last.mask is item.mask is Mask.FULL


def _virtual(row: Row) -> int:
    resident = row.sequence.resident
    extent = resident.extent_of(Stack.SELF) if resident is not None else None
    return extent.size if extent is not None else 0
