import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.scheduler.slots import Extent, SlotAllocator


def test_first_fit_and_coalescing():
    slots = SlotAllocator(10)
    a, b, c = slots.allocate(3), slots.allocate(3), slots.allocate(4)
    assert (a, b, c) == (Extent(0, 3), Extent(3, 3), Extent(6, 4))
    assert slots.allocate(1) is None
    slots.release(b)
    slots.release(a)
    assert slots.allocate(6) == Extent(0, 6)
    assert slots.used == 10


def test_what_is_taken_from_the_high_end_leaves_the_low_end_whole():
    slots = SlotAllocator(10)
    a, b = slots.allocate(2, high=True), slots.allocate(3, high=True)
    assert (a, b, slots.allocate(5), slots.allocate(1, high=True)) == (Extent(8, 2), Extent(5, 3), Extent(0, 5), None)
    slots.release(a)
    assert slots.allocate(2, high=True) == a
    slots.release(b)
    assert (slots.allocate(1, high=True), slots.free) == (Extent(7, 1), [Extent(5, 2)])


def test_growth_keeps_the_start_and_needs_the_very_next_slots():
    slots = SlotAllocator(10)
    a = slots.allocate(2)
    b = slots.allocate(2)
    assert slots.grow(a, 3) is None
    assert slots.grow(b, 8) == Extent(2, 8)
    assert slots.grow(Extent(2, 8), 9) is None


def test_parts_lie_side_by_side_and_leave_the_rest():
    extent = Extent(10, 11)
    assert [extent.part(index, 3) for index in range(3)] == [Extent(10, 3), Extent(13, 3), Extent(16, 3)]
    assert extent.part(1, 3).behind(2) == Extent(15, 1)
    assert extent.part(0, 1) == extent.behind(0) == extent


def test_releasing_what_is_not_held_is_an_error():
    slots = SlotAllocator(4)
    held = slots.allocate(2)
    slots.release(held)
    with pytest.raises(KeyError, match="not held"):
        slots.release(held)
    with pytest.raises(KeyError):
        slots.release(Extent(0, 3))


def test_the_integrity_check_can_fail():
    slots = SlotAllocator(4)
    slots._held[1] = Extent(1, 2)
    with pytest.raises(AssertionError, match="hole or overlap"):
        slots.check_integrity()


@given(
    st.lists(
        st.tuples(st.sampled_from(["allocate", "allocate high", "release", "grow"]), st.integers(1, 9)), max_size=80
    )
)
def test_random_operations_never_lose_or_share_a_slot(operations):
    slots, held = SlotAllocator(24), []
    for verb, number in operations:
        if verb.startswith("allocate") and (extent := slots.allocate(number, high=verb == "allocate high")):
            held.append(extent)
        elif verb == "release" and held:
            slots.release(held.pop(number % len(held)))
        elif verb == "grow" and held:
            old = held[number % len(held)]
            grown = slots.grow(old, old.size + number)
            if grown:
                held[held.index(old)] = grown
        slots.check_integrity()
        covered = [slot for extent in held for slot in range(extent.start, extent.end)]
        assert len(covered) == len(set(covered)) == slots.used
