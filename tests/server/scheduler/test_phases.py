from __future__ import annotations

import pytest

from server.scheduler.messages import FinishReason, GenerationRequest
from server.scheduler.plan import RowResult
from server.scheduler.sampling_params import SamplingParams
from server.scheduler.scheduler import Limits, Scheduler

LIMITS = Limits(slots=64, rows=1, step_tokens=8, context_length=32, waiting=6)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def scheduler(clock) -> Scheduler:
    return Scheduler(LIMITS, frozenset(), clock)


def add(scheduler: Scheduler, name: str, prompt: int, new: int) -> None:
    params = SamplingParams(max_tokens=new, temperature=0.0)
    scheduler.add(GenerationRequest(name, "t", tuple(range(prompt)), params), seed=0)


def step(scheduler: Scheduler, clock: Clock, seconds: float) -> None:
    plan = scheduler.schedule()
    clock.now += seconds
    scheduler.commit(plan, [RowResult(7 if row.samples else None) for row in plan.rows])


def times(scheduler: Scheduler) -> list[tuple[int, float]]:
    phases = scheduler.phases
    readings = [one.read() for one in (phases.queue, phases.prefill, phases.decode)]
    return [(reading.counts[-1], pytest.approx(reading.total)) for reading in readings]


def test_a_request_waits_reads_and_writes(scheduler, clock):
    add(scheduler, "a", prompt=10, new=3)
    clock.now += 5
    for seconds in (2, 3, 0.5, 0.25):  # the prompt in two chunks, then two tokens more
        step(scheduler, clock, seconds)
    assert times(scheduler) == [(1, 5.0), (1, 5.0), (1, 0.75)]


def test_one_behind_another_waits_for_as_long_as_it_runs(scheduler, clock):
    add(scheduler, "a", prompt=2, new=2)
    add(scheduler, "b", prompt=2, new=1)
    for _ in range(3):
        step(scheduler, clock, 1)
    assert times(scheduler) == [(2, 2.0), (2, 2.0), (2, 1.0)]


def test_one_that_ends_in_the_queue_only_waited(scheduler, clock):
    add(scheduler, "a", prompt=2, new=2)
    clock.now += 7
    scheduler.abort("a", FinishReason.TIMEOUT)
    assert times(scheduler) == [(1, 7.0), (0, 0.0), (0, 0.0)]


def test_a_preemption_begins_nothing_anew(scheduler, clock):
    add(scheduler, "a", prompt=2, new=4)
    step(scheduler, clock, 1)
    step(scheduler, clock, 1)
    scheduler.admission.preempt(scheduler.running[0])
    clock.now += 10
    for _ in range(2):
        step(scheduler, clock, 1)
    assert times(scheduler) == [(1, 0.0), (1, 1.0), (1, 13.0)]
