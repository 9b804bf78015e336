"""Where a sequence's tokens go: slots of its own, beside a prefix that is resident once for all its readers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable

from server.scheduler.messages import PrefixPayload
from server.scheduler.plan import Load, Move
from server.scheduler.preloads import Preloads
from server.scheduler.residency import Residency, Resident
from server.scheduler.sequence import Sequence
from server.scheduler.slots import Extent, SlotAllocator


class Space:
    """The slots and the residents, and the transfers that the next step has to make for them."""

    def __init__(self, slots: int, preloadable: int = 0) -> None:
        self.slots = SlotAllocator(slots)
        self.preloads = Preloads(preloadable)
        self.residency = Residency(self.slots, self.preloads)
        self._transfers: list[Load | Move] = []

    def take_transfers(self) -> tuple[Load | Move, ...]:
        """What has to be copied since the last time this was asked, in order."""
        transfers, self._transfers = tuple(self._transfers), []
        return transfers

    def move(self, moves: Iterable[Move]) -> None:
        """Has slots copied within what a sequence holds."""
        self._transfers += moves

    def preload(self, payload: PrefixPayload, holder: Hashable) -> None:
        """Has a prefix on the device from the next step on, until `release`. Raises what `Preloads.add` raises."""
        self.preloads.add(payload, holder)

    def release(self, digest: str, holder: Hashable) -> None:
        """Ends a holder's preload; slots that nobody reads or holds any more are free at once."""
        self.preloads.remove(digest, holder)
        self.residency.drop(digest)

    def bring(self) -> bool:
        """Brings in what is to be preloaded; False if there is no room for all of it."""
        for payload in self.preloads.missing:
            if payload.slots and payload.digest not in self.residency:
                extent = self._allocate(payload.slots, high=True)
                if extent is None:
                    return False
                resident = self.residency.admit(payload, extent)
                resident.is_loaded = True
                self.residency.unpin(resident)
                self._transfers.append(Load(payload, extent))
        self.preloads.miss_none()
        return True

    def compact(self) -> None:
        """While no row runs: what is preloaded lies at the high end, all else is free, and any legal request fits."""
        self.residency.clear()
        self.preloads.miss_all()
        there_is_room = self.bring()
        assert there_is_room, "more is preloaded than may be"

    def place(self, sequence: Sequence, size: int) -> bool:
        """Finds `size` own slots for a sequence, its source's and its prefix's; False, with nothing held, without."""
        payload = sequence.request.prefix
        if payload is not None and payload.slots:
            sequence.resident = self._pin(payload)
            if sequence.resident is None:
                return False
        sequence.extent = self._allocate(size)
        if sequence.extent is not None and sequence.source_length:
            sequence.source = self._allocate(sequence.source_length)
        if sequence.extent is None or (sequence.source is None and sequence.source_length):
            self.vacate(sequence)
            return False
        if sequence.resident is not None:
            self.residency.count_start(sequence.resident)
        return True

    def grow(self, sequence: Sequence, index: int) -> bool:
        """Sees to a slot for the sequence's token of that index, in place or elsewhere; False if there is none.

        Those before it are computed by then.
        """
        extent, width = sequence.extent, sequence.width
        assert extent is not None
        each = extent.size // width
        if index < each:
            return True
        size = width * min(2 * each, sequence.final_length)
        # the parts of beams would overlap where they were
        grown = self.slots.grow(extent, size) if width == 1 else None
        if grown is None:
            grown = self._allocate(size)
            if grown is None:
                return False
            parts = ((extent.part(index, width), grown.part(index, width)) for index in range(width))
            self._transfers += [Move(*part, index) for part in parts]
            self.slots.release(extent)
        sequence.extent = grown
        return True

    def vacate(self, sequence: Sequence) -> None:
        """Gives a sequence's slots back and lets go of its prefix."""
        for extent in sequence.extents:
            self.slots.release(extent)
        if sequence.resident is not None:
            self.residency.unpin(sequence.resident)
        sequence.extent = sequence.source = sequence.resident = None

    def would_fit(self, sequence: Sequence, size: int, leaving: Iterable[Sequence]) -> bool:
        """Whether a sequence and its prefix fit side by side for sure once others have left and idle prefixes too."""
        own = self._missing(sequence)
        digest = sequence.request.prefix.digest if sequence.request.prefix is not None else None
        readers = Counter(other.resident.payload.digest for other in leaving if other.resident is not None)
        freed = [extent for other in leaving for extent in other.extents]
        for resident in self.residency.residents():
            other = resident.payload.digest
            if other != digest and other not in self.preloads and resident.pins == readers[other]:
                freed.append(resident.extent)
        return self.slots.longest_run(freed) >= own + sequence.source_length + size

    def make_run(self, sequence: Sequence, size: int) -> None:
        """Evicts idle prefixes until there is one free run for what `would_fit`; then `place` cannot fail."""
        if beside := self._missing(sequence) + sequence.source_length:
            there_is_room = self.residency.evict(beside + size)
            assert there_is_room, "it was said to fit"

    def check_integrity(self, readers: list[Sequence]) -> None:
        """Raises AssertionError unless every slot is free or held by exactly one owner, and pins equal readers."""
        self.slots.check_integrity()
        residents = self.residency.residents()
        owners = [extent.size for reader in readers for extent in reader.extents]
        owners += [resident.extent.size for resident in residents]
        assert sum(owners) == self.slots.used, "slots are held that nobody owns"
        for resident in residents:
            assert resident.extent.size == resident.payload.slots, "a prefix has not the room it takes"
            pins = sum(reader.resident is resident for reader in readers)
            assert resident.pins == pins, f"{resident.pins} pins, {pins} readers"
        for reader in readers:
            length = reader.source.size if reader.source is not None else 0
            assert length == reader.source_length, "a source has not the room it takes"
        assert self.preloads.slots <= self.preloads.most, "more is preloaded than may be"

    def _missing(self, sequence: Sequence) -> int:
        """Slots that the sequence's prefix would have to be brought into."""
        payload = sequence.request.prefix
        if payload is None or payload.digest in self.residency:
            return 0
        return payload.slots

    def _pin(self, payload: PrefixPayload) -> Resident | None:
        resident = self.residency.pin(payload.digest)
        if resident is None and (extent := self._allocate(payload.slots, high=True)) is not None:
            resident = self.residency.admit(payload, extent)
            self._transfers.append(Load(payload, extent))
        return resident

    def _allocate(self, size: int, *, high: bool = False) -> Extent | None:
        """Slots, at the cost of idle prefixes if that helps.

        Prefixes lie at the high end and rows at the low one: small extents that stay would cut up what large ones that
        come and go need in one piece.
        """
        extent = self.slots.allocate(size, high=high)
        if extent is None and self.residency.evict(size):
            extent = self.slots.allocate(size, high=high)
        return extent
