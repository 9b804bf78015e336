import pytest

from server.scheduler.messages import PrefixPayload
from server.scheduler.residency import Residency
from server.scheduler.slots import SlotAllocator


def payload(digest: str, length: int = 2) -> PrefixPayload:
    return PrefixPayload(digest, length, length, True, None)


def admit(residency: Residency, slots: SlotAllocator, digest: str):
    return residency.admit(payload(digest), slots.allocate(2))


def test_eviction_takes_the_least_recently_used_that_nobody_reads():
    slots = SlotAllocator(8)
    residency = Residency(slots)
    a, b, c = (admit(residency, slots, name) for name in "abc")
    residency.unpin(a)
    residency.unpin(c)
    residency.unpin(residency.pin("a"))  # used again: c is older now
    assert residency.evict_one()
    assert [resident.payload.digest for resident in residency.residents()] == ["b", "a"]
    assert residency.evict_one()
    assert not residency.evict_one()
    assert residency.residents() == [b]
    assert slots.used == 2
    assert residency.evictions == 2


def test_memories_and_prefixes_are_residents_alike():
    slots = SlotAllocator(12)
    residency = Residency(slots)
    memory = PrefixPayload("memory", 0, 0, True, None, feature_map="elu", memory_slots=5)
    assert (memory.slots, payload("kv", 3).slots) == (5, 3)
    pinned = residency.admit(memory, slots.allocate(memory.slots))
    residency.unpin(admit(residency, slots, "kv"))
    assert (slots.used, residency.evict_one(), slots.used, residency.evict_one()) == (7, True, 5, False)
    residency.unpin(pinned)
    assert residency.pin("memory") is pinned
    assert not residency.evict_one()
    residency.unpin(pinned)
    assert residency.evict_one()
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
