"""A step planned before the one before it is read is the step that would have been planned after."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable

import pytest

from server.scheduler.limits import Limits
from server.scheduler.messages import FinishReason, GenerationRequest, PrefixPayload
from server.scheduler.plan import RowResult, StepPlan
from server.scheduler.sampling_params import SamplingParams
from server.scheduler.scheduler import Scheduler
from tests.server.scheduler.traffic import EOS

SAYS = 7


def make(rows: int = 4, slots: int = 400, step_tokens: int = 32) -> Scheduler:
    return Scheduler(Limits(slots, rows, step_tokens, 100, 50), frozenset({EOS}), lambda: 0.0)


def add(scheduler: Scheduler, name: str, prompt: int = 3, new: int = 9, tenant: str = "t", **params) -> None:
    chosen = SamplingParams(**{"max_tokens": new, **params})
    scheduler.add(GenerationRequest(name, tenant, tuple(range(prompt)), chosen), seed=0)


def results(plan: StepPlan, ending: set[str] = frozenset()) -> list[RowResult]:
    says = [EOS if row.sequence.request.id in ending else SAYS for row in plan.rows]
    return [RowResult(token if row.samples else None) for token, row in zip(says, plan.rows, strict=True)]


def alive(plan: StepPlan) -> StepPlan:
    return StepPlan(plan.transfers, tuple(row for row in plan.rows if row.is_alive))


def following(scheduler: Scheduler, behind: StepPlan | None) -> StepPlan:
    """What is left of a step that was planned ahead, or else a new one."""
    left = alive(behind) if behind is not None else StepPlan((), ())
    return left if left.rows else scheduler.schedule()


def seen(plan: StepPlan) -> object:
    """A plan by what the device does of it."""
    rows = [(row.sequence.request.id, row.start, row.count, row.sequence.extent) for row in plan.rows]
    return sorted(rows), plan.transfers


@pytest.mark.parametrize("seed", range(30))
def test_it_is_the_plan_that_would_have_been_made(seed):
    """As far as no row ends; where it declines, nothing is compared."""
    draw = random.Random(seed)
    scheduler = make(draw.choice([1, 3, 8]), draw.choice([150, 250, 1000]), draw.choice([8, 32]))
    found = Counter()
    for number in range(12):
        new, greedy = draw.choice([1, 2, 30, 60]), draw.choice([0.0, 1.0])
        penalty = draw.choice([1.0] * 9 + [1.2])
        add(scheduler, f"{number}", draw.choice([1, 5, 30]), new, temperature=greedy, repetition_penalty=penalty)
    while scheduler.running or scheduler.waiting:
        plan = scheduler.schedule()
        early, early_plan = copy.deepcopy((scheduler, plan))
        behind = early.ahead(early_plan)
        found[behind is not None] += 1
        scheduler.commit(plan, results(plan))
        if behind is None:
            continue
        early.commit(early_plan, results(early_plan))
        assert seen(alive(behind)) == seen(copy.deepcopy(scheduler).schedule())
        early.check_integrity()
    assert found[True]
    assert found[False]


@pytest.fixture
def scheduler() -> Scheduler:
    return make()


def decoding(scheduler: Scheduler, *names: str, **params) -> StepPlan:
    """A step of these requests that has been planned, after the one that reads their prompts."""
    for name in names:
        add(scheduler, name, **params)
    plan = scheduler.schedule()
    scheduler.commit(plan, results(plan))
    return scheduler.schedule()


def test_what_has_ended_is_left_out_when_it_is_known_and_not_before(scheduler):
    plan = decoding(scheduler, "a", "b")
    behind = scheduler.ahead(plan)
    assert [(row.sequence.request.id, row.start) for row in behind.rows] == [("a", 4), ("b", 4)]
    scheduler.commit(plan, results(plan, {"a"}))
    assert [row.sequence.request.id for row in alive(behind).rows] == ["b"]
    third = scheduler.ahead(alive(behind))
    assert [(row.sequence.request.id, row.start) for row in third.rows] == [("b", 5)]
    scheduler.commit(alive(behind), results(alive(behind)))
    scheduler.check_integrity()


def test_whoever_is_at_its_last_token_is_not_in_it(scheduler):
    add(scheduler, "long")
    plan = decoding(scheduler, "short", new=2)
    assert [row.sequence.request.id for row in scheduler.ahead(plan).rows] == ["long"]


def test_there_is_none_behind_the_end_of_all(scheduler):
    assert scheduler.ahead(decoding(scheduler, "a", "b", new=2)) is None


def test_a_step_that_reads_the_end_of_a_prompt_may_have_one_behind_it(scheduler):
    add(scheduler, "a", prompt=40)
    first = scheduler.schedule()
    assert scheduler.ahead(first) is None
    scheduler.commit(first, results(first))
    assert [(row.start, row.count) for row in scheduler.ahead(scheduler.schedule()).rows] == [(40, 1)]


@pytest.mark.parametrize("params", [{"logprobs": 0}, {"frequency_penalty": 1.0}, {"min_tokens": 8}])
def test_a_row_that_the_host_has_to_look_at_keeps_all_from_it(scheduler, params):
    add(scheduler, "plain")
    assert scheduler.ahead(decoding(scheduler, "other", **params)) is None


def test_a_row_that_was_left_out_of_the_step_before_is_not_forgotten(scheduler):
    plan = decoding(scheduler, "a", "b")
    assert scheduler.ahead(StepPlan((), plan.rows[:1])) is None


def test_steps_behind_one_another_cost_what_they_take_and_no_more():
    now = 0.0
    scheduler = Scheduler(Limits(400, 4, 32, 100, 50), frozenset({EOS}), lambda: now)
    plan = decoding(scheduler, "a", "b", new=60)
    for _ in range(40):
        behind = scheduler.ahead(plan)
        now += 1.0
        scheduler.commit(plan, results(plan))
        plan = behind
    assert scheduler._step_cost._alone(2) == pytest.approx(1.0)


def test_it_waits_for_whoever_could_be_let_in(scheduler):
    plan = decoding(scheduler, "a", "b")
    add(scheduler, "new")
    assert scheduler.ahead(plan) is None


def test_who_waits_for_a_row_of_its_own_tenant_holds_nothing_up_until_one_is_free(scheduler):
    names = ("a", "b", "c", "d", "waits")
    plan = decoding(scheduler, *names, new=4)
    assert [sequence.request.id for sequence in scheduler.waiting] == ["waits"]
    assert len(scheduler.ahead(plan).rows) == 4
    scheduler.commit(plan, results(plan))
    last = scheduler.schedule()
    assert scheduler.ahead(last).rows
    scheduler.commit(last, results(last))
    assert scheduler.ahead(scheduler.schedule()) is None, "their last tokens: the one that waits is next"


def test_a_tenant_that_is_entitled_to_a_row_at_once_is_let_in(scheduler):
    plan = decoding(scheduler, "a", "b", "c", "d")
    add(scheduler, "new", tenant="other")
    assert scheduler.ahead(plan) is None


def test_it_waits_for_what_is_to_be_preloaded(scheduler):
    plan = decoding(scheduler, "a")
    scheduler.space.preload(PrefixPayload("p", 5, 5, True, None), "somebody")
    assert scheduler.ahead(plan) is None


def test_it_takes_slots_from_nobody():
    scheduler = make(rows=2, slots=140)
    plan = decoding(scheduler, "a", "b", prompt=4, new=90)
    for _ in range(200):
        behind = scheduler.ahead(plan)
        if behind is None:
            break
        scheduler.commit(plan, results(plan))
        plan = behind
    scheduler.commit(plan, results(plan))
    assert scheduler.admission.preemptions == 0
    scheduler.schedule()
    assert scheduler.admission.preemptions == 1
    scheduler.check_integrity()


def test_what_is_aborted_meanwhile_is_not_alive(scheduler):
    plan = decoding(scheduler, "a", "b")
    behind = scheduler.ahead(plan)
    scheduler.commit(plan, results(plan))
    scheduler.abort("a", FinishReason.ABORT)
    assert [row.sequence.request.id for row in alive(behind).rows] == ["b"]


def steps_until(
    scheduler: Scheduler, is_waited_for: Callable[[GenerationRequest], bool], *, within: int, is_ahead: bool
) -> int:
    """Steps until such a request has a row."""
    behind = None
    for step in range(within):
        plan = following(scheduler, behind)
        if any(is_waited_for(row.sequence.request) for row in plan.rows):
            return step
        behind = scheduler.ahead(plan) if is_ahead else None
        scheduler.commit(plan, results(plan))
        scheduler.check_integrity()
    raise AssertionError("it is never let in")


def steps_until_let_in(*, is_ahead: bool) -> int:
    """Steps until `b`, which waits with two small requests, has a row.

    `a` runs a long answer and waits with a request that does not fit. At first `b` is ahead of it by a little more than
    the longest row could cost, so that it is not its turn; a few tokens of `a` later it is.
    """
    scheduler = make(rows=8, slots=150)
    add(scheduler, "runs", new=90, tenant="a")
    first = scheduler.schedule()
    scheduler.commit(first, results(first))
    add(scheduler, "large", prompt=90, new=5, tenant="a")
    scheduler.service.lift("b", 220)
    for name in ("small", "other"):
        add(scheduler, name, new=3, tenant="b")
    return steps_until(scheduler, lambda request: request.tenant == "b", within=200, is_ahead=is_ahead)


def test_whose_turn_comes_meanwhile_is_let_in_a_step_later_at_most() -> None:
    assert steps_until_let_in(is_ahead=True) <= steps_until_let_in(is_ahead=False) + 1


def test_who_waits_for_slots_is_let_in_a_step_after_they_are_given_back() -> None:
    scheduler = make(rows=8, slots=100)
    for name, new in (("short", 20), ("long", 90)):
        add(scheduler, name, prompt=4, new=new)
    add(scheduler, "waits", prompt=20, new=3)
    behind, ended, steps_ahead = None, None, 0
    for step in range(100):
        plan = following(scheduler, behind)
        if any(row.sequence.request.id == "waits" for row in plan.rows):
            assert ended is not None
            assert step - ended <= 2
            assert steps_ahead > 10
            return
        behind = scheduler.ahead(plan)
        steps_ahead += behind is not None
        events = scheduler.commit(plan, results(plan, {"short"} if step == 15 else frozenset()))
        if any(event.finish_reason for event in events):
            ended = ended or step
    raise AssertionError("it is never let in")


def steps_until_asked_again(*, is_ahead: bool) -> int:
    """Steps until `a`'s waiting request has a row, which fits once the one behind it has been refused.

    At first its prefix lies in the middle of what is free. The other one's, brought in vain, drives that out.
    """
    scheduler = make(rows=8, slots=162)
    near, wide = (PrefixPayload(f"p{size}", size, size, True, None) for size in (10, 50))
    for tenant in ("a", "b"):
        add(scheduler, f"runs of {tenant}", new=40, tenant=tenant)
    first = scheduler.schedule()
    scheduler.commit(first, results(first))
    gap, middle = (scheduler.slots.allocate(size, high=True) for size in (20, 10))
    resident = scheduler.residency.admit(near, middle)
    resident.is_loaded = True
    scheduler.residency.unpin(resident)
    scheduler.slots.release(gap)
    for tenant, prefix, prompt in (("a", near, 45), ("b", wide, 25)):
        request = GenerationRequest(f"waits of {tenant}", tenant, (5,) * prompt, SamplingParams(max_tokens=6), prefix)
        scheduler.add(request, seed=0)
    return steps_until(scheduler, lambda request: request.id == "waits of a", within=30, is_ahead=is_ahead)


def test_whom_a_refusal_of_another_makes_room_for_is_let_in_a_step_later_at_most() -> None:
    assert steps_until_asked_again(is_ahead=True) <= steps_until_asked_again(is_ahead=False) + 1
