from __future__ import annotations

import random
from collections import deque

import pytest

from server.engine.room import PATIENCE, Room
from server.scheduler.plan import Row
from tests.server.scheduler.traffic import make_sequence


def rows(*counts: int) -> deque[Row]:
    return deque(Row(make_sequence(prompt=count), 0, count) for count in counts)


def pieces(room: Room, waiting: deque[Row]) -> list[list[int]]:
    found = []
    while waiting:
        found.append([row.count for row in room.take(waiting)])
    return found


def reading(source: int, count: int) -> Row:
    """A row whose source is yet to be read."""
    sequence = make_sequence(prompt=count)
    object.__setattr__(sequence.request, "source_ids", tuple(range(source)))
    return Row(sequence, 0, count)


def test_a_whole_step_is_one_piece_until_memory_runs_out():
    assert pieces(Room(512), rows(*[1] * 64, 448)) == [[*[1] * 64, 448]]


def test_after_a_shortage_a_piece_has_half_as_many_tokens_and_rows_stay_in_order():
    room, waiting = Room(512), rows(1, 1, 3, 2, 9)
    room.note_shortage(waiting)
    assert room.tokens == 8
    assert pieces(room, waiting) == [[1, 1, 3, 2], [8]]


def test_a_chunk_is_cut_and_the_rest_of_it_is_not_of_this_step():
    room, waiting = Room(512), rows(100, 1)
    room.note_shortage(waiting)
    assert pieces(room, waiting) == [[50], [1]]


def test_a_source_is_never_cut():
    room = Room(512)
    row = reading(source=30, count=5)
    room.note_shortage([row])
    assert room.tokens == 17
    assert pieces(room, deque([row, *rows(1)])) == [[1], [1]]
    room.tokens = 33
    assert pieces(room, deque([row, *rows(1)])) == [[3], [1]]


def test_it_grows_by_twice_after_so_many_pieces_and_never_beyond_the_most():
    room = Room(12)
    room.note_shortage(rows(5, 5))
    sizes = []
    for _ in range(3 * PATIENCE):
        room.note_fit()
        sizes.append(room.tokens)
    assert sizes == [5] * (PATIENCE - 1) + [10] * PATIENCE + [12] * (PATIENCE + 1)


def test_a_shortage_on_the_way_begins_the_waiting_anew():
    room = Room(64)
    room.note_shortage(rows(8))
    for _ in range(PATIENCE - 1):
        room.note_fit()
    room.note_shortage(rows(2))
    room.note_fit()
    assert room.tokens == 1


@pytest.mark.parametrize("seed", range(20))
def test_any_step_ends_after_few_attempts_whatever_fits(seed):
    """Halving as the engine does, with any bound on what fits: all rows are done or are single tokens that do not."""
    draw = random.Random(seed)
    step = rows(*(draw.choice([1, 1, 1, draw.randint(1, 60)]) for _ in range(draw.randint(1, 40))))
    most, total, count = draw.choice([0, 1, 3, 20]), sum(row.count for row in step), len(step)
    room, attempts, done = Room(total), 0, 0
    while step:
        piece = room.take(step)
        attempts += 1
        cost = sum(row.count for row in piece)
        if cost <= most or cost == 1:
            done += len(piece)
        else:
            room.note_shortage(piece)
            step.extendleft(reversed(piece))
    assert done == count
    assert attempts <= count + total.bit_length()
