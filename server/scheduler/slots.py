"""Contiguous extents of KV-pool slots: first fit from either end, growth in place, coalescing."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Extent:
    """Slots `[start, start + size)`."""

    start: int
    size: int

    @property
    def end(self) -> int:
        """First slot after the extent."""
        return self.start + self.size

    def part(self, index: int, parts: int) -> Extent:
        """One of so many equal parts; what is left over lies behind the last."""
        size = self.size // parts
        return Extent(self.start + index * size, size)

    def behind(self, count: int) -> Extent:
        """All but the first `count` slots."""
        return Extent(self.start + count, self.size - count)


class SlotAllocator:
    """Hands out disjoint extents of `[0, total)`. Free extents never touch one another."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.releases = 0
        self._free: list[Extent] = [Extent(0, total)] if total else []  # sorted by start
        self._held: dict[int, Extent] = {}

    @property
    def used(self) -> int:
        """Slots that are held."""
        return sum(extent.size for extent in self._held.values())

    def allocate(self, size: int, *, high: bool = False) -> Extent | None:
        """The lowest or the highest extent of exactly `size` slots, or None if no free run is long enough."""
        places = range(len(self._free))
        for index in reversed(places) if high else places:
            free = self._free[index]
            if free.size >= size:
                extent = Extent(free.end - size if high else free.start, size)
                self._take(index, extent)
                return self._hold(extent)
        return None

    def grow(self, extent: Extent, size: int) -> Extent | None:
        """The same start with `size` slots, if the slots right after it are free; else None and nothing changes."""
        index = bisect_left(self._free, extent.end, key=lambda free: free.start)
        missing = size - extent.size
        if index == len(self._free) or self._free[index].start != extent.end or self._free[index].size < missing:
            return None
        self._take(index, Extent(extent.end, missing))
        return self._hold(Extent(extent.start, size))

    def release(self, extent: Extent) -> None:
        """Gives slots back. Raises KeyError for an extent that is not held."""
        if self._held.get(extent.start) != extent:
            raise KeyError(f"{extent} is not held")
        del self._held[extent.start]
        self.releases += 1
        index = bisect_left(self._free, extent.start, key=lambda free: free.start)
        start, end = extent.start, extent.end
        if index < len(self._free) and self._free[index].start == end:
            end = self._free.pop(index).end
        if index > 0 and self._free[index - 1].end == start:
            start = self._free.pop(index - 1).start
            index -= 1
        self._free.insert(index, Extent(start, end - start))

    @property
    def free(self) -> list[Extent]:
        """The free runs, lowest first."""
        return list(self._free)

    def longest_run(self, extents: Iterable[Extent]) -> int:
        """The longest free run there would be if these held extents were released too."""
        longest = start = end = 0
        for extent in sorted([*self._free, *extents], key=lambda extent: extent.start):
            start = start if extent.start == end else extent.start
            end = extent.end
            longest = max(longest, end - start)
        return longest

    def check_integrity(self) -> None:
        """Raises AssertionError unless free and held extents tile the pool and no two free ones touch."""
        tiles = sorted([*self._free, *self._held.values()], key=lambda extent: extent.start)
        position = 0
        for tile in tiles:
            assert tile.start == position, f"hole or overlap at slot {position}: {tile}"
            assert tile.size > 0, f"empty extent: {tile}"
            position = tile.end
        assert position == self.total, f"slots {position} to {self.total} are lost"
        ends = {free.end for free in self._free}
        assert not any(free.start in ends for free in self._free), "two free extents touch"

    def _take(self, index: int, extent: Extent) -> None:
        """Cuts an extent off either end of a free run."""
        free = self._free[index]
        if free.size == extent.size:
            self._free.pop(index)
        else:
            start = extent.end if extent.start == free.start else free.start
            self._free[index] = Extent(start, free.size - extent.size)

    def _hold(self, extent: Extent) -> Extent:
        self._held[extent.start] = extent
        return extent
