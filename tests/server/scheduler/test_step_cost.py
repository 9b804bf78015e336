"""What is learnt of the cost of steps, and what the scheduler makes of it."""

from __future__ import annotations

import pytest

from server.scheduler.plan import RowResult
from server.scheduler.scheduler import Scheduler
from server.scheduler.step_cost import ADDED, ADDED_MOST, MOST_WITH_PROMPTS, SOON, StepCost
from tests.server.scheduler.test_scheduler import Clock, make, request


def learn(cost: StepCost, fixed: float, each: float, steps: int = 60, most: int = 400) -> None:
    """Steps as a server has them: many that only decode, and chunks as large as they may be."""
    for index in range(steps):
        decoding = 1 + index % 20
        cost.note(decoding, 0, 0, fixed + each * decoding)
        if index % 3 == 0:
            chunk = min(most, max(16, cost.bearable(decoding) or most))
            cost.note(decoding, chunk, 0, fixed + each * (decoding + chunk))


@pytest.mark.parametrize(("fixed", "each"), [(0.010, 0.001), (0.004, 0.00001), (0.001, 0.002)])
def test_as_many_prompt_tokens_as_add_a_share_of_the_step(fixed: float, each: float) -> None:
    cost = StepCost()
    learn(cost, fixed, each)
    assert cost.bearable(12) == pytest.approx(ADDED * (fixed / each + 12), rel=0.05, abs=2)
    assert cost.bearable(100) == pytest.approx(ADDED * (fixed / each + 100), rel=0.05, abs=2), "no step was like this"


@pytest.mark.parametrize("further", [0.0, 0.0002, 0.003])
def test_tokens_behind_long_texts_cost_what_they_were_seen_to_cost(further: float) -> None:
    cost = StepCost()
    for index in range(100):
        context = 50 * (37 * index % 100)
        cost.note(8, 0, 0, 0.018)
        cost.note(8, 30, context, 0.018 + 30 * (0.001 + further * context / 1000))
    for context in (0, 1000, 6000):
        each = 0.001 + further * context / 1000
        assert cost.bearable(8, context) == pytest.approx(ADDED * 0.018 / each, rel=0.1, abs=1)


def test_short_texts_say_nothing_of_long_ones() -> None:
    cost = StepCost()
    for index in range(100):
        cost.note(8, 0, 0, 0.018)
        cost.note(8, 30, index % 7, 0.018 + 0.030 + 0.003 * (index % 2))
    assert cost.bearable(8, 4000) == pytest.approx(cost.bearable(8, 0), rel=0.5)


def test_nobody_can_tell_without_both_kinds_of_step() -> None:
    cost = StepCost()
    cost.note(0, 400, 0, 0.4)
    assert cost.bearable(8) is None
    for _ in range(50):
        cost.note(8, 0, 0, 0.1)
    assert cost.bearable(8) is None


def test_prompts_that_cost_nothing_are_not_held_back() -> None:
    cost = StepCost()
    for _ in range(9):
        cost.note(8, 0, 0, 0.1)
        cost.note(8, 100, 0, 0.1)
    assert cost.bearable(8) is None


@pytest.mark.parametrize("seconds", [0.1, 2.0, 100.0])
@pytest.mark.parametrize("when", [0, 1, 2, 40])
def test_an_outlier_is_forgotten_by_the_steps_that_it_still_allows(seconds: float, when: int) -> None:
    cost = StepCost()
    for index in range(when):
        cost.note(8, 0, 0, 0.0108)
        cost.note(8, 100, 0, 0.0208 + index * 1e-9)
    cost.note(8, 0, 0, 0.0108)
    cost.note(8, 400, 0, seconds)
    learn(cost, 0.010, 0.0001, steps=400)
    assert cost.bearable(8) == pytest.approx(ADDED * 108, rel=0.1)
    for _ in range(3):
        cost.note(8, 0, 0, seconds)
    learn(cost, 0.010, 0.0001, steps=100)
    assert cost.bearable(8) == pytest.approx(ADDED * 108, rel=0.1)


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_a_clock_that_does_not_move_tells_nothing(seconds: float) -> None:
    cost = StepCost()
    for _ in range(5):
        cost.note(8, 0, 0, seconds)
        cost.note(8, 100, 0, seconds)
    assert cost.bearable(8) is None


def step(scheduler: Scheduler, clock: Clock, fixed: float = 0.020, each: float = 0.001, late: float = 0) -> list[int]:
    """One step that takes what its tokens cost; the tokens of each row."""
    plan = scheduler.schedule()
    counts = [row.count for row in plan.rows]
    clock.now += fixed + each * sum(counts) + late
    scheduler.commit(plan, [RowResult(7 if row.samples else None) for row in plan.rows])
    return counts


def warm(**limits: int) -> tuple[Scheduler, Clock]:
    """A scheduler that has seen prompts beside eight rows that decode."""
    clock = Clock()
    scheduler = make(clock, slots=20_000, context_length=10_000, step_tokens=512, rows=64, waiting=500, **limits)
    for index in range(8):
        scheduler.add(request(f"warm {index}", prompt=4, new=60), seed=0)
    for index in range(20):
        scheduler.add(request(f"prompt {index}", prompt=50, new=1), seed=0)
        for _ in range(4):
            step(scheduler, clock)
    assert not scheduler.running
    return scheduler, clock


def decoding(scheduler: Scheduler, clock: Clock, rows: int) -> None:
    """So many rows that are past their prompts."""
    for index in range(rows):
        scheduler.add(request(f"{index}", prompt=4, new=200), seed=0)
    while any(sequence.remaining > 1 for sequence in scheduler.running) or scheduler.waiting:
        step(scheduler, clock)


def test_a_prompt_lets_a_step_take_so_much_longer_and_no_more() -> None:
    scheduler, clock = warm()
    decoding(scheduler, clock, 8)
    scheduler.add(request("short", prompt=90), seed=0)
    sizes = [sum(step(scheduler, clock)) for _ in range(5)]
    assert sizes == pytest.approx([8 + ADDED * 28] * 5, abs=3)


def test_steps_are_longer_where_prompts_would_take_many() -> None:
    scheduler, clock = warm()
    decoding(scheduler, clock, 8)
    length = 280
    scheduler.add(request("long", prompt=length), seed=0)
    assert sum(step(scheduler, clock)) == pytest.approx(8 + length / SOON, abs=3)
    for index in range(5):
        scheduler.add(request(f"another {index}", prompt=length), seed=0)
    assert sum(step(scheduler, clock)) == pytest.approx(8 + ADDED_MOST * 28, abs=3), "and never longer than that"


@pytest.mark.parametrize("late", [0.2, 3.0])
def test_a_step_that_was_late_once_does_not_lift_the_bound_while_prompts_wait(late: float) -> None:
    scheduler, clock = warm()
    for index in range(40):
        scheduler.add(request(f"{index}", prompt=2, new=2000), seed=0)
    while scheduler.waiting or any(sequence.remaining > 1 for sequence in scheduler.running):
        step(scheduler, clock)
    step(scheduler, clock, late=late)
    for index in range(20):
        scheduler.add(request(f"long {index}", prompt=9000), seed=0)
    sizes = [sum(step(scheduler, clock)) for _ in range(240)]
    later = sizes[-4 * MOST_WITH_PROMPTS :]
    assert max(sizes) == 512
    assert max(later[len(later) // 2 :]) <= 41 + ADDED_MOST * 61 * 1.1
    assert sum(size <= 41 for size in later) <= 9, "steps without prompts are few"


def test_a_prompt_that_delays_nobody_takes_the_whole_step() -> None:
    scheduler, clock = warm()
    scheduler.add(request("long", prompt=600), seed=0)
    assert step(scheduler, clock) == [512]


def test_a_long_prompt_does_not_hold_up_a_short_one_of_the_same_tenant() -> None:
    scheduler, clock = warm()
    scheduler.add(request("long", prompt=5000), seed=0)
    step(scheduler, clock)
    scheduler.add(request("short", prompt=30, new=1), seed=0)
    plan = scheduler.schedule()
    assert [(row.sequence.request.id, row.count, row.samples) for row in plan.rows] == [
        ("long", 482, False),
        ("short", 30, True),
    ]
