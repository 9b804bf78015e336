"""The attention of one step as a list of work items, the same for every backend.

An item lets the packed query rows `[q_lo, q_hi)` attend to the pool slots `[kv_lo, kv_hi)`. Each query row has exactly
one item of part OWN and at most one of part PREFIX; the two partial results merge by log-sum-exp. `q_pos` and `kv_pos`
are the places of the first query and the first key in the row's whole sequence, virtual tokens included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

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


def work_items(rows: Sequence[Row], window: int | None) -> list[WorkItem]:
    """The items of packed `rows` for layers with this sliding window (None: they see everything).

    Rows that share a prefix should be neighbours: then it is read once for all of them.
    """
    own: list[WorkItem] = []
    prefixes: list[WorkItem] = []
    q_lo = 0
    for row in rows:
        own.append(_own(row, q_lo, window))
        prefix = _prefix(row, q_lo, window)
        if prefix is not None and prefixes and _continues(prefixes[-1], prefix):
            prefixes[-1] = replace(prefixes[-1], q_hi=prefix.q_hi)
        elif prefix is not None:
            prefixes.append(prefix)
        q_lo += row.count
    return own + prefixes


def prefill_item(extent: Extent, window: int) -> WorkItem:
    """Tokens that fill an extent from position 0 on and see nothing else; `window` 0 is none."""
    mask = Mask.WINDOW if window and extent.size > window else Mask.CAUSAL
    return WorkItem(Part.OWN, mask, 0, extent.size, extent.start, extent.end, 0, 0)


def _own(row: Row, q_lo: int, window: int | None) -> WorkItem:
    extent = row.sequence.extent
    assert extent is not None
    virtual = _virtual(row)
    end = row.start + row.count
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
        if virtual + row.start + row.count > window and row.count > 1:
            mask = Mask.WINDOW
    return WorkItem(
        Part.PREFIX, mask, q_lo, q_lo + row.count, start + first, start + virtual, virtual + row.start, first
    )


def _continues(last: WorkItem, item: WorkItem) -> bool:
    """Whether the item's queries adjoin the last one's and see the same slots, all of them."""
    same_slots = (last.kv_lo, last.kv_hi) == (item.kv_lo, item.kv_hi)
    return same_slots and last.q_hi == item.q_lo and last.mask is item.mask is Mask.FULL


def _virtual(row: Row) -> int:
    resident = row.sequence.resident
    return resident.payload.virtual_tokens if resident is not None else 0
