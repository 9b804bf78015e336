import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.scheduler.messages import PrefixPayload
from server.scheduler.residency import Residency
from server.scheduler.slots import Extent, SlotAllocator


def payload(digest: str, length: int = 2) -> PrefixPayload:
    return PrefixPayload(digest, length, length, True, None)


def admit(residency: Residency, slots: SlotAllocator, digest: str):
    return residency.admit(payload(digest), slots.allocate(2))


def test_eviction_takes_the_least_recently_used_that_nobody_reads():
    slots = SlotAllocator(6)
    residency = Residency(slots)
    a, b, c = (admit(residency, slots, name) for name in "abc")
    residency.unpin(a)
    residency.unpin(c)
    residency.unpin(residency.pin("a"))  # used again: c is older now
    assert residency.evict(2)
    assert [resident.payload.digest for resident in residency.residents()] == ["b", "a"]
    assert residency.evict(2), "there is room already"
    assert (residency.evictions, slots.allocate(2)) == (1, Extent(4, 2))
    assert residency.evict(2)
    assert slots.allocate(2) == Extent(0, 2)
    assert not residency.evict(2)
    assert residency.residents() == [b]
    assert residency.evictions == 2


def test_a_run_is_made_of_neighbours_however_old_others_are():
    slots = SlotAllocator(10)
    residency = Residency(slots)
    for resident in [admit(residency, slots, name) for name in "abcde"]:
        residency.unpin(resident)
    for name in "bdaec":  # from the longest ago to just now
        residency.unpin(residency.pin(name))
    assert residency.evict(4)
    assert [resident.payload.digest for resident in residency.residents()] == ["d", "e", "c"]
    assert slots.allocate(4) == Extent(0, 4)
    assert not residency.evict(7)
    assert len(residency) == 3, "what cannot be had costs nobody anything"


@given(
    sizes=st.lists(st.integers(1, 4), max_size=8),
    pinned=st.lists(st.booleans(), min_size=8, max_size=8),
    order=st.permutations(range(8)),
    gaps=st.sets(st.integers(0, 7)),
    size=st.integers(1, 12),
)
def test_no_other_run_is_older(sizes, pinned, order, gaps, size):
    slots = SlotAllocator(20)
    residency = Residency(slots)
    residents = []
    for index, length in enumerate(sizes):
        extent = slots.allocate(length)
        if extent is not None and index in gaps:
            slots.release(extent)
        elif extent is not None:
            residents.append(residency.admit(payload(f"{index}", length), extent))
    for index in order:
        for resident in residents:
            if resident.payload.digest == f"{index}":
                residency.pin(f"{index}")
                residency.unpin(resident)
                if not pinned[index]:
                    residency.unpin(resident)
    ages = {r.payload.digest: age for age, r in enumerate(residency.residents())}
    owner = {slot: r for r in residents for slot in range(r.extent.start, r.extent.end)}
    costs = []
    for start in range(20 - size + 1):
        there = [owner[slot] for slot in range(start, start + size) if slot in owner]
        if not any(r.pins for r in there):
            costs.append(max((ages[r.payload.digest] for r in there), default=-1))
    assert residency.evict(size) == bool(costs)
    gone = [age for digest, age in ages.items() if digest not in {r.payload.digest for r in residency.residents()}]
    assert max(gone, default=-1) == min(costs, default=-1)
    slots.check_integrity()
    assert (slots.allocate(size) is not None) == bool(costs)


def test_memories_and_prefixes_are_residents_alike():
    slots = SlotAllocator(7)
    residency = Residency(slots)
    memory = PrefixPayload("memory", 0, 0, True, None, feature_map="elu", memory_slots=5)
    assert (memory.slots, payload("kv", 3).slots) == (5, 3)
    pinned = residency.admit(memory, slots.allocate(memory.slots))
    residency.unpin(admit(residency, slots, "kv"))
    assert (slots.used, residency.evict(3), residency.evict(2), slots.used) == (7, False, True, 5)
    residency.unpin(pinned)
    assert residency.pin("memory") is pinned
    assert not residency.evict(3)
    residency.unpin(pinned)
    assert residency.evict(7)
    assert slots.used == 0


def test_one_digest_is_resident_once():
    slots = SlotAllocator(8)
    residency = Residency(slots)
    admit(residency, slots, "a")
    with pytest.raises(KeyError, match="resident already"):
        admit(residency, slots, "a")
    assert residency.pin("a").pins == 2
    assert residency.pin("b") is None


def test_pinned_prefixes_cannot_be_forgotten():
    slots = SlotAllocator(8)
    residency = Residency(slots)
    resident = admit(residency, slots, "a")
    with pytest.raises(AssertionError):
        residency.clear()
    residency.unpin(resident)
    residency.clear()
    assert len(residency) == slots.used == 0
    with pytest.raises(AssertionError):
        residency.unpin(resident)


def test_what_never_came_is_forgotten_even_if_kept_and_only_there_where_it_was_to_be():
    slots = SlotAllocator(6)
    residency = Residency(slots, kept={"a"})
    a = admit(residency, slots, "a")
    residency.lose("a", Extent(4, 2))
    residency.lose("unknown", a.extent)
    assert "a" in residency
    with pytest.raises(AssertionError, match="cannot be lost"):
        residency.lose("a", a.extent)
    residency.unpin(a)
    residency.lose("a", a.extent)
    assert ("a" in residency, slots.used, residency.evictions) == (False, 0, 0)
