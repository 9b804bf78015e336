"""What tenants may rely on when others flood the server. Each proof has a control that fails it."""

from __future__ import annotations

import math

import pytest

from prefix_store.errors import Overloaded
from server.scheduler.service import Service
from tests.server.scheduler.traffic import Traffic, make_scheduler, shares

# (prompt, new) of each tenant, all of which always have more to ask for
SATURATING = {
    "equal sizes": {"a": (4, 40), "b": (4, 40)},
    "prompts against answers": {"a": (4, 40), "b": (40, 4)},
    "the longest against the shortest": {"a": (4, 90), "b": (10, 1)},
    "three sizes": {"a": (10, 10), "b": (60, 20), "c": (5, 60)},
}


def flooded(*, blind: bool = False, prompt: int = 4, new: int = 90, warm_up: int = 7, **limits: int) -> Traffic:
    """Tenant a has every row taken, and 200 more of its requests wait."""
    traffic = Traffic(make_scheduler(**limits), blind=blind)
    rows = traffic.scheduler.limits.rows
    for _ in range(200):
        traffic.add("a", prompt, new)
    traffic.run(1)
    for _ in range(rows):
        traffic.add("a", prompt, new)
    traffic.run(warm_up)
    while len(traffic.scheduler.running) < rows:
        assert traffic.steps < 100
        traffic.step()
    return traffic


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("prompt", [1, 16, 60])
@pytest.mark.parametrize("warm_up", [0, 13])
def test_a_single_request_starts_at_once_whatever_another_has_queued(rows, prompt, warm_up):
    traffic = flooded(rows=rows, warm_up=warm_up)
    name = traffic.add("b", prompt, 5)
    assert traffic.wait_for(name) <= 2
    traffic.scheduler.check_integrity()
    assert traffic.scheduler.admission.preemptions == 1
    # its prefill has all of the budget that decoding leaves
    prefill = math.ceil(prompt / (32 - rows))
    traffic.run(prefill + 5)
    assert traffic.finished[name] <= traffic.first_planned[name] + prefill - 1 + 4


def test_first_come_first_served_keeps_a_single_request_waiting():
    traffic = flooded(blind=True)
    assert traffic.wait_for(traffic.add("b", 16, 5)) > 1000


def test_a_tenant_with_one_request_at_a_time_never_waits_behind_a_flood():
    traffic = flooded(rows=4)
    for index in range(30):
        name = traffic.add("b", 5 + index % 9, 3)
        assert traffic.wait_for(name) <= 2, index
        while name not in traffic.finished:
            traffic.step()


def test_who_uses_more_than_the_flood_one_request_at_a_time_is_held_to_its_share():
    traffic = flooded(rows=2)
    waits = []
    for _ in range(30):
        name = traffic.add("b", 90, 1)
        waits.append(traffic.wait_for(name))
        while name not in traffic.finished:
            traffic.step()
    assert waits[:2] == [1, 1]
    # rows of a make 4 a step, a request of b is charged 92
    assert sum(waits[10:]) / 20 == pytest.approx(92 / 4, rel=0.2)


def test_many_tenants_are_all_let_in_at_once_and_then_nobody_is():
    traffic = flooded(rows=8)
    names = [traffic.add(tenant, 2, 50) for tenant in "bcdefghi"]
    assert [traffic.wait_for(name) for name in names] == [1] + [0] * 7
    assert traffic.scheduler.admission.preemptions == 8  # the flood has not even one row now
    traffic.add("j", 2, 5)
    traffic.run(20)
    assert traffic.scheduler.admission.preemptions == 8
    assert {sequence.request.tenant for sequence in traffic.scheduler.running} == set("bcdefghi")


def test_a_row_is_given_up_in_the_middle_of_a_prompt_too_and_comes_first_again():
    traffic = flooded(rows=2, prompt=80, new=16, step_tokens=16)
    newest = traffic.scheduler.running[-1]
    traffic.wait_for(traffic.add("b", 4, 2))
    assert newest not in traffic.scheduler.running
    assert next(iter(line for line in traffic.scheduler.waiting.lines if line.tenant == "a")).first is newest


def test_a_flood_of_long_prompts_leaves_budget_for_another():
    def first_token(*, blind: bool) -> int:
        traffic = Traffic(make_scheduler(rows=64, step_tokens=512, context_length=5000), blind=blind)
        for _ in range(200):
            traffic.add("a", 4000, 8)
        traffic.run(20)
        name, before = traffic.add("b", 300, 1), traffic.steps
        while name not in traffic.finished:
            traffic.step()
        return traffic.finished[name] - before

    assert first_token(blind=False) <= 2
    assert first_token(blind=True) > 1000


@pytest.mark.parametrize("begun", [1, 2, 4])
def test_long_prompts_that_have_begun_leave_budget_for_another_tenants_next(begun):
    """Also where that tenant has a row already, so that nobody is let in for it."""
    traffic = Traffic(make_scheduler(slots=400_000, rows=64, step_tokens=128, context_length=9000))
    traffic.add("b", 4, 1000)
    traffic.run(5)
    for _ in range(begun):
        traffic.add("a", 8000, 8)
    traffic.run(5)
    name, before = traffic.add("b", 30, 1), traffic.steps
    while name not in traffic.finished:
        traffic.step()
    assert traffic.finished[name] - before <= 2


@pytest.mark.parametrize("shape", SATURATING)
@pytest.mark.parametrize(
    ("steps", "limits"),
    [(1500, {"rows": 3}), (1500, {"rows": 8}), (600, {"rows": 64, "step_tokens": 128}), (1500, {"slots": 400})],
    ids=str,
)
def test_tenants_that_always_want_more_get_equal_service(shape, steps, limits):
    tenants = SATURATING[shape]
    traffic = Traffic(make_scheduler(**limits))
    traffic.run(200, tenants, depth=70)
    served = traffic.run(steps, tenants, depth=70)
    assert shares(served, tenants) == pytest.approx([1 / len(tenants)] * len(tenants), abs=0.01)
    if "slots" not in limits:
        # observed 2.4 % at worst, with three rows; where slots are short, rows make way for one another anyway
        assert traffic.recomputed < 0.03 * traffic.served.total()


@pytest.mark.parametrize("shape", list(SATURATING)[1:])
def test_first_come_first_served_serves_large_requests_more(shape):
    tenants = SATURATING[shape]
    served = Traffic(make_scheduler(), blind=True).run(1500, tenants, depth=70)
    assert max(shares(served, tenants)) > 1.2 / len(tenants)


def test_a_deeper_queue_is_no_larger_share():
    def shares_of(*, blind: bool) -> list[float]:
        traffic = Traffic(make_scheduler(), blind=blind)
        for _ in range(1000):
            traffic.add("a", 4, 20)
        return shares(traffic.run(500, {"b": (4, 20)}, depth=10), "ab")

    assert shares_of(blind=False) == pytest.approx([0.5, 0.5], abs=0.02)
    assert shares_of(blind=True) == [1, 0]


def test_a_pause_gives_no_credit(monkeypatch):
    def shares_after_a_pause() -> list[float]:
        traffic = Traffic(make_scheduler())
        traffic.run(1000, {"a": (4, 20)})
        return shares(traffic.run(300, {"a": (4, 20), "b": (4, 20)}), "ab")

    assert shares_after_a_pause() == pytest.approx([0.5, 0.5], abs=0.05)
    monkeypatch.setattr(Service, "lift", lambda *_: None)
    assert shares_after_a_pause()[1] > 0.8


def crowded(*, blind: bool = False) -> Traffic:
    """Two tenants of small requests keep the slots full; c asks for something that needs most of them."""
    traffic = Traffic(make_scheduler(slots=120, rows=16), blind=blind)
    traffic.run(50, {"a": (4, 12), "b": (6, 9)})
    traffic.add("c", 60, 30)
    return traffic


def test_a_large_request_neither_blocks_small_ones_nor_starves():
    traffic = crowded()
    # as if neither had a row to spare
    traffic.scheduler.admission._place_by_force = traffic.scheduler.admission._place
    before = traffic.served.copy()
    while "c/" not in "".join(traffic.first_planned):
        traffic.run(1, {"a": (4, 12), "b": (6, 9)})
        assert traffic.steps < 200
    passed = traffic.served - before
    assert passed["a"] > 50
    assert passed["b"] > 50
    # no further ahead than was allowed, and what was running then
    assert max(passed.values()) < traffic.scheduler.admission._allowance + 120 * 2


def test_without_a_bound_small_requests_would_starve_a_large_one():
    traffic = crowded()
    traffic.scheduler.admission._place_by_force = traffic.scheduler.admission._place
    traffic.scheduler.admission._allowance = 10**9
    traffic.run(2000, {"a": (4, 12), "b": (6, 9)})
    assert not any(name.startswith("c/") for name in traffic.first_planned)


def test_a_large_request_takes_the_slots_of_as_few_rows_as_it_needs():
    traffic = flooded(rows=16, new=16, slots=16 * 19)
    name = traffic.add("b", 40, 10)
    assert traffic.wait_for(name) == 1
    assert traffic.scheduler.admission.preemptions == math.ceil(49 / 19)
    traffic.scheduler.check_integrity()


def test_a_full_queue_keeps_places_for_others():
    traffic = flooded(waiting=200)
    assert len(traffic.scheduler.waiting) == 200
    with pytest.raises(Overloaded, match=r"^200 requests are waiting already; try"):
        traffic.add("a", 4, 4)
    for _ in range(100):
        traffic.add("b", 4, 4)
    with pytest.raises(Overloaded, match="300 requests are waiting already, 100 of them yours; try again later"):
        traffic.add("b", 4, 4)
    traffic.add("c", 4, 4)


def test_in_first_come_first_served_a_flood_is_everybodys_refusal():
    traffic = flooded(waiting=200, blind=True)
    with pytest.raises(Overloaded):
        traffic.add("b", 4, 4)


def test_preempted_work_is_charged_once(monkeypatch):
    monkeypatch.setattr("server.scheduler.admission.HEADROOM", 1)
    monkeypatch.setattr(Service, "lift", lambda *_: None)
    traffic = Traffic(make_scheduler(slots=150, rows=8))
    for _ in range(10):
        for tenant in "ab":
            traffic.add(tenant, 10, 30)
    while traffic.scheduler.running or traffic.scheduler.waiting:
        traffic.step()
    assert traffic.recomputed > 100
    assert {tenant: traffic.scheduler.service.received(tenant) for tenant in "ab"} == traffic.served
    assert set(traffic.served.values()) == {10 * (10 + 2 * 30)}
