import random

import pytest

from prefix_store.geometry import Stack
from server.scheduler.messages import PrefixPayload
from server.scheduler.plan import Load, Move
from server.scheduler.sequence import Sequence
from server.scheduler.space import Space
from tests.server.scheduler.traffic import make_request, make_sequence

PREFIXES = [PrefixPayload(f"d{length}", length, length, True, None) for length in (2, 5, 9, 14)]
MEMORIES = [PrefixPayload(f"m{slots}", 0, 0, True, None, feature_map="elu", memory_slots=slots) for slots in (3, 12)]
STACKED = [
    PrefixPayload("all", 5, 5, True, None, stacks=tuple(Stack)),
    PrefixPayload("encoder", 6, 0, True, None, stacks=(Stack.ENCODER,)),
    PrefixPayload("soft", 3, 0, True, None, is_embeds=True, stacks=()),
]


def sequence(prompt: int = 4, new: int = 9, prefix: PrefixPayload | None = None, source: int = 0) -> Sequence:
    return Sequence(make_request("a", "r", prompt, new, prefix, source), seed=0)


def test_what_does_not_fit_holds_nothing():
    space = Space(10)
    assert not space.place(sequence(prefix=PREFIXES[1]), 6)
    assert space.slots.used == 5  # the prefix stays, and nobody reads it
    space.check_integrity([])
    assert space.place(sequence(), 6)
    assert space.residency.evictions == 1


def test_the_parts_of_a_group_grow_apart():
    space = Space(40)
    group = make_sequence(prompt=4, new=9, beams=3)
    assert space.place(group, 12)
    group.computed = 3
    assert space.grow(group, group.computed)
    assert space.take_transfers() == ()
    group.computed = 4
    assert space.grow(group, group.computed)
    assert group.extent.size == 24
    moves = space.take_transfers()
    assert [(move.source.start, move.target.start, move.size) for move in moves] == [(0, 12, 4), (4, 20, 4), (8, 28, 4)]
    group.computed = 8
    assert not space.grow(group, group.computed)  # 36 more are not free
    space.check_integrity([group])


def test_growth_is_in_place_or_a_move():
    space = Space(20)
    first, second = sequence(), sequence()
    assert space.place(first, 4)
    assert space.place(second, 4)
    first.computed = second.computed = 4
    assert space.grow(second, second.computed)
    assert space.take_transfers() == ()
    assert space.grow(first, first.computed)
    (move,) = space.take_transfers()
    assert isinstance(move, Move)
    assert (first.extent.size, second.extent.size) == (8, 8)
    first.computed = 8
    assert not space.grow(first, first.computed)
    space.check_integrity([first, second])


def test_a_prefix_is_loaded_once():
    space = Space(30)
    first, second = sequence(prefix=PREFIXES[2]), sequence(prefix=PREFIXES[2])
    assert space.place(first, 4)
    assert space.place(second, 4)
    assert [type(transfer) for transfer in space.take_transfers()] == [Load]
    assert space.take_transfers() == ()


def test_a_memory_holds_slots_of_its_own_beside_its_readers_once():
    space = Space(30)
    first, second = sequence(prefix=MEMORIES[1]), sequence(prefix=MEMORIES[1])
    assert space.would_fit(first, 18, [])
    assert not space.would_fit(first, 19, [])
    assert space.place(first, 4)
    assert space.place(second, 4)
    assert [transfer.extent.size for transfer in space.take_transfers()] == [12]
    space.check_integrity([first, second])
    assert not space.place(sequence(prefix=PREFIXES[3]), 4)  # in use, so it is not evicted
    space.vacate(first)
    space.vacate(second)
    assert space.place(sequence(prefix=PREFIXES[3]), 4)


def test_a_source_has_an_extent_of_its_own_as_long_as_its_row():
    space = Space(30)
    placed = sequence(source=12)
    assert not space.place(placed, 19)
    assert space.slots.used == 0
    space.check_integrity([])
    assert space.place(placed, 18)
    assert (placed.source.size, space.slots.used) == (12, 30)
    space.check_integrity([placed])
    space.vacate(placed)
    assert (placed.source, placed.extent, space.slots.used) == (None, None, 0)


def test_the_decoders_stacks_lie_one_behind_the_other_and_the_encoders_beside_them():
    space, made = Space(40), [sequence(prefix=prefix, source=4) for prefix in STACKED]
    for one in made:
        assert space.place(one, 2)
    whole, encoder, soft = (one.resident for one in made)
    assert soft is None
    assert made[2].source.size == 4 + 3  # a soft prompt is a part of each source
    assert (whole.extent.size, encoder.extent.size) == (10, 6)
    first = whole.extent.start
    assert [whole.extent_of(stack).start for stack in Stack] == [first, first + 5, first]
    assert [encoder.extent_of(stack) for stack in Stack] == [None, None, encoder.extent]
    space.check_integrity(made)


def test_the_integrity_check_can_fail():
    space, placed = Space(10), sequence()
    space.place(placed, 4)
    with pytest.raises(AssertionError, match="nobody owns"):
        space.check_integrity([])


@pytest.mark.parametrize("seed", range(300))
def test_what_would_fit_does(seed):
    draw = random.Random(seed)
    # those of a decoder-only model, or of the other kind
    prefixes, sources = ([None, *PREFIXES, *MEMORIES], [0]) if seed < 200 else ([None, *STACKED], [1, 4, 9])
    space, placed = Space(60), []
    for _ in range(40):
        made = sequence(prefix=draw.choice(prefixes), source=draw.choice(sources))
        if space.place(made, draw.randint(1, 12)):
            placed.append(made)
        if placed and draw.random() < 0.4:
            space.vacate(placed.pop(draw.randrange(len(placed))))
    leaving = [made for made in placed if draw.random() < 0.6]
    wanting = sequence(prefix=draw.choice(prefixes), source=draw.choice(sources))
    size = next((size for size in range(60, 0, -1) if space.would_fit(wanting, size, leaving)), None)
    if size is None:
        return
    for made in leaving:
        space.vacate(made)
    space.make_run(wanting, size)
    assert space.place(wanting, size)
    space.check_integrity([wanting, *(made for made in placed if made not in leaving)])
