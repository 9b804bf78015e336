from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

from trainer.room import MOST, Room


def run(cost: int = 1, tenant: str = "a", **more: Any) -> Any:
    """As much of a run as a room sees."""
    facts = {"is_suspect": False, "had_turn": True, "can_be_saved": True, **more}
    return SimpleNamespace(cost=cost, job=SimpleNamespace(tenant=tenant), **facts)


def queue(waiting: set[str], **busy: int) -> Any:
    return SimpleNamespace(waiting=lambda takes: waiting, busy=lambda: Counter(busy))


def making_way(runs: list[Any], jobs: Any) -> Any:
    return Room(len(runs) - 1, runs).making_way(jobs, lambda needs: True)


def test_one_that_is_alone_is_tried_and_others_need_room():
    runs: list[Any] = []
    room = Room(3, runs)
    assert room.is_there
    assert room.fits(100)
    runs.append(run(2))
    assert room.fits(1)
    assert not room.fits(2)
    assert not room.is_there, "it is kept for who did not fit"
    assert room.fits(1)
    assert room.is_there


def test_who_is_trained_is_in_nobodys_way():
    trained = [run(0) for _ in range(MOST)]
    assert Room(3, trained).is_there
    assert Room(3, trained).fits(100)
    assert Room(3, [run(2), run(2), *trained]).too_many().cost == 2
    assert not Room(3, [*trained, run(0, is_suspect=True)]).is_there


def test_there_is_a_most_and_who_is_tried_is_alone():
    runs = [run() for _ in range(MOST - 1)]
    assert Room(MOST, runs).is_there
    assert not Room(MOST, [*runs, run()]).is_there
    assert not Room(3, [run(is_suspect=True)]).is_there


def test_what_ran_out_of_memory_together_is_too_many_until_nobody_is_left():
    runs = [run(2), run(1), run(1)]
    room = Room(9, runs)
    assert room.too_many() is None
    room.shrink()
    assert (room.limit, room.too_many()) == (3, runs[2])
    del runs[1:]
    assert room.too_many() is None
    room.empty()
    assert room.limit == 9


def test_the_newest_of_who_has_most_makes_way_first():
    runs = [run(tenant="a"), run(tenant="b"), run(tenant="b"), run(tenant="a"), run(tenant="a")]
    assert making_way(runs, queue({"c"}, a=3, b=2)) is runs[4]
    assert making_way(runs, queue({"a", "b"}, a=3, b=2)) is None
    assert making_way(runs, queue({"c"}, a=3, b=4, c=3)) is runs[2]


def test_of_those_with_one_run_who_came_first_and_had_its_turn_makes_way():
    runs = [run(tenant="a", had_turn=False), run(tenant="b", can_be_saved=False), run(tenant="c"), run(tenant="d")]
    assert making_way(runs, queue({"e"}, a=1, b=1, c=1, d=1)) is runs[2]
    assert making_way(runs, queue({"e"}, a=1, b=1, c=1, d=2, e=1)) is runs[3]
    assert making_way(runs, queue({"e"}, a=1, b=1, c=1, d=1, e=1)) is None


def test_the_queue_is_not_asked_while_nobody_could_make_way():
    nobody = cast("Any", None)
    assert making_way([run(tenant="a", had_turn=False), run(tenant="b", had_turn=False)], nobody) is None
    assert Room(9, [run()]).making_way(nobody, lambda needs: True) is None, "there is room"
    assert making_way([run(), run(is_suspect=True)], nobody) is None
