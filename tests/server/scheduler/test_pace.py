"""How soon a refused client is told to come back."""

from __future__ import annotations

from server.scheduler.pace import LONGEST, REMEMBERED, Pace


def test_nothing_has_ended_yet():
    assert Pace().seconds_to_wait(100.0) == 1


def test_the_mean_gap_rounded_up():
    pace = Pace()
    for end in (10.0, 13.0, 16.0):
        pace.note(end)
    assert pace.seconds_to_wait(16.0) == 2
    assert pace.seconds_to_wait(19.0) == 3


def test_many_ends_a_second_are_one_second():
    pace = Pace()
    for end in range(100):
        pace.note(end / 1000)
    assert pace.seconds_to_wait(0.1) == 1


def test_a_stalled_engine_is_not_asked_for_ever_nor_often():
    pace = Pace()
    pace.note(0.0)
    assert pace.seconds_to_wait(30.0) == 30
    assert pace.seconds_to_wait(1e6) == LONGEST


def test_only_the_last_few_count():
    pace = Pace()
    pace.note(0.0)
    for end in range(REMEMBERED):
        pace.note(1000.0 + end)
    assert pace.seconds_to_wait(1000.0 + REMEMBERED) == 1
