"""Which prefixes have slots on the device. Only what nobody reads, and nobody wants kept, is ever evicted."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container
from dataclasses import dataclass

from prefix_store.geometry import Stack
from server.scheduler.messages import PrefixPayload
from server.scheduler.slots import Extent, SlotAllocator


@dataclass
class Resident:
    """A prefix in the pool, stored once however many sequences read it.

    `pins` counts those sequences; `is_loaded` says whether any sequence has found room beside it yet.
    """

    payload: PrefixPayload
    extent: Extent
    pins: int = 0
    is_loaded: bool = False

    def extent_of(self, stack: Stack) -> Extent | None:
        """Where its keys and values of a stack lie, if it has any there."""
        payload = self.payload
        if not payload.virtual_tokens or stack not in payload.stacks:
            return None
        return Extent(self.extent.start + payload.offset(stack), payload.virtual_tokens)


class Residency:
    """Digest -> resident prefix, least recently used first. Those of `kept` digests stay, read or not."""

    def __init__(self, slots: SlotAllocator, kept: Container[str] = ()) -> None:
        self._slots = slots
        self._kept = kept
        self._residents: OrderedDict[str, Resident] = OrderedDict()
        self.hits = 0
        self.misses = 0
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._residents)

    def __contains__(self, digest: object) -> bool:
        return digest in self._residents

    def pin(self, digest: str) -> Resident | None:
        """Pins a prefix that is already resident; None if it is not."""
        resident = self._residents.get(digest)
        if resident is None:
            return None
        resident.pins += 1
        self._residents.move_to_end(digest)
        return resident

    def admit(self, payload: PrefixPayload, extent: Extent) -> Resident:
        """Makes a prefix resident in an extent the caller has allocated and will fill; it comes back pinned once."""
        if payload.digest in self._residents:
            raise KeyError(f"{payload.digest} is resident already")
        resident = self._residents[payload.digest] = Resident(payload, extent, pins=1)
        return resident

    def count_start(self, resident: Resident) -> None:
        """Notes that a sequence starts with a prefix: a miss for the one it was loaded for, a hit for all others."""
        self.hits += resident.is_loaded
        self.misses += not resident.is_loaded
        resident.is_loaded = True

    def unpin(self, resident: Resident) -> None:
        """One reader less."""
        assert resident.pins > 0, "unpinned more often than pinned"
        resident.pins -= 1

    def evict(self, size: int) -> bool:
        """Evicts idle prefixes so that `size` slots in one run are free; False, evicting none, if that cannot be.

        Of all runs that would do, the one whose most recently used prefix was used the longest ago: prefixes that lie
        apart are not evicted one by one until some happen to lie together.
        """
        idle = {r.extent: (age, r) for age, r in enumerate(self._residents.values()) if self.is_idle(r)}
        run: list[Extent] = []
        best: tuple[int, list[Extent]] | None = None
        for extent in sorted([*self._slots.free, *idle], key=lambda extent: extent.start):
            if run and run[-1].end != extent.start:
                run.clear()
            run.append(extent)
            while extent.end - run[0].end >= size:
                run.pop(0)
            if extent.end - run[0].start >= size:
                youngest = max(idle[extent][0] if extent in idle else -1 for extent in run)
                if best is None or youngest < best[0]:
                    best = youngest, list(run)
        if best is None:
            return False
        for extent in best[1]:
            if extent in idle:
                self._give_back(idle[extent][1])
        return True

    def is_idle(self, resident: Resident) -> bool:
        """Whether it may be evicted."""
        return resident.pins == 0 and resident.payload.digest not in self._kept

    def drop(self, digest: str) -> None:
        """Evicts one prefix, if it is there and idle."""
        resident = self._residents.get(digest)
        if resident is not None and self.is_idle(resident):
            self._give_back(resident)

    def lose(self, digest: str, extent: Extent) -> None:
        """Forgets a prefix that never came into its extent, kept or not; nobody may read it any more."""
        resident = self._residents.get(digest)
        if resident is not None and resident.extent == extent:
            assert resident.pins == 0, "a pinned prefix cannot be lost"
            self._slots.release(extent)
            del self._residents[digest]

    def clear(self) -> None:
        """Forgets every prefix; none may be pinned."""
        assert not any(resident.pins for resident in self._residents.values()), "a pinned prefix cannot be forgotten"
        for resident in self._residents.values():
            self._slots.release(resident.extent)
        self._residents.clear()

    def residents(self) -> list[Resident]:
        """All of them, least recently used first."""
        return list(self._residents.values())

    def _give_back(self, resident: Resident) -> None:
        self._slots.release(resident.extent)
        del self._residents[resident.payload.digest]
        self.evictions += 1
