"""What is learnt of the cost of steps, and what the scheduler makes of it."""

from __future__ import annotations

import pytest

from server.scheduler.plan import RowResult
from server.scheduler.scheduler import Scheduler
from server.scheduler.step_cost import StepCost
from tests.server.scheduler.test_scheduler import Clock, make, request


@pytest.mark.parametrize(("fixed", "each"), [(0.010, 0.001), (0.004, 0.00001), (0.0, 0.002)])
def test_a_line_is_found(fixed: float, each: float) -> None:
    cost = StepCost()
    for tokens in (1, 3, 8, 40, 300, 8, 3) * 20:
        cost.note(tokens, fixed + each * tokens)
    assert cost.equivalent(16) == pytest.approx(fixed / each + 16, rel=0.02, abs=1)


def test_steps_of_one_size_tell_nothing_and_forget_nothing() -> None:
    cost = StepCost()
    for _ in range(50):
        cost.note(8, 0.1)
    assert cost.equivalent(8) is None
    cost.note(100, 0.2)
    before = cost.equivalent(8)
    for _ in range(10_000):
        cost.note(8, 0.1)
    assert cost.equivalent(8) == before


def test_more_tokens_in_no_more_time_are_no_line() -> None:
    cost = StepCost()
    for tokens in (1, 100):
        cost.note(tokens, 0.1)
    assert cost.equivalent(1) is None


def test_one_slow_step_counts_for_a_tenth() -> None:
    cost = StepCost()
    for tokens in (10, 100) * 50:
        cost.note(tokens, tokens / 1000)
    cost.note(100, 1.0)
    assert cost.equivalent(10) == pytest.approx(10, abs=6)


def step(scheduler: Scheduler, clock: Clock, fixed: float = 0.010, each: float = 0.001) -> list[int]:
    """One step that takes what its tokens cost; the tokens of each row."""
    plan = scheduler.schedule()
    counts = [row.count for row in plan.rows]
    clock.now += fixed + each * sum(counts)
    scheduler.commit(plan, [RowResult(7 if row.samples else None) for row in plan.rows])
    return counts


def warm(**limits: int) -> tuple[Scheduler, Clock]:
    """A scheduler that has seen steps of several sizes."""
    clock = Clock()
    scheduler = make(clock, slots=20_000, context_length=10_000, step_tokens=512, rows=64, waiting=500, **limits)
    for index, prompt in enumerate((3, 20, 100, 400)):
        scheduler.add(request(f"warm {index}", prompt=prompt, new=2), seed=0)
        while scheduler.running or scheduler.waiting:
            step(scheduler, clock)
    return scheduler, clock


def test_a_prompt_lets_a_step_take_twice_as_long_and_no_more() -> None:
    scheduler, clock = warm()
    for index in range(8):
        scheduler.add(request(f"{index}", prompt=4, new=200), seed=0)
    while any(sequence.remaining > 1 for sequence in scheduler.running) or scheduler.waiting:
        step(scheduler, clock)
    scheduler.add(request("long", prompt=400), seed=0)
    sizes = [sum(step(scheduler, clock)) for _ in range(5)]
    assert all(8 < size <= 2 * (10 + 8) - 10 + 2 for size in sizes), sizes


def test_a_prompt_that_delays_nobody_takes_the_whole_step() -> None:
    scheduler, clock = warm()
    scheduler.add(request("long", prompt=600), seed=0)
    assert step(scheduler, clock) == [512]


def test_a_pile_of_prompts_is_not_put_off_for_ever() -> None:
    scheduler, clock = warm()
    scheduler.add(request("decodes", prompt=2, new=1000), seed=0)
    step(scheduler, clock)
    for index in range(100):
        scheduler.add(request(f"{index}", prompt=400), seed=0)
    assert sum(step(scheduler, clock)) > 40_000 / 128 - 1


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
