import pytest

from prefix_store.errors import Conflict, InvalidRequest
from server.scheduler.limits import Limits
from server.scheduler.messages import PrefixPayload
from server.scheduler.plan import Load
from server.scheduler.preloads import Preloads
from server.scheduler.scheduler import Scheduler
from tests.server.scheduler.traffic import Traffic, make_scheduler


def payload(digest: str, length: int = 2) -> PrefixPayload:
    return PrefixPayload(digest, length, length, True, None)


def resident(scheduler: Scheduler) -> set[str]:
    return {found.payload.digest for found in scheduler.residency.residents()}


def test_content_counts_once_however_many_hold_it():
    preloads = Preloads(5)
    for holder in "abb":
        preloads.add(payload("p", 3), holder)
    assert (preloads.slots, preloads.holders(), len(preloads)) == (3, {"p": {"a", "b"}}, 1)
    preloads.remove("p", "b")
    preloads.remove("p", "nobody")
    assert "p" in preloads
    preloads.remove("p", "a")
    preloads.remove("p", "a")
    assert (preloads.slots, preloads.holders(), preloads.missing) == (0, {}, [])


def test_there_is_a_bound_and_it_says_what_to_do():
    preloads = Preloads(5)
    with pytest.raises(InvalidRequest, match="takes 6 KV slots; preloaded ones may take 5 in all"):
        preloads.add(payload("large", 6), "a")
    preloads.add(payload("p", 3), "a")
    with pytest.raises(Conflict, match="takes 3 KV slots; of the 5 for preloaded ones 3 are taken: release another"):
        preloads.add(payload("q", 3), "a")
    assert preloads.holders() == {"p": {"a"}}
    preloads.remove("p", "a")
    preloads.add(payload("q", 3), "a")


@pytest.mark.parametrize(("slots", "most"), [(100, 0), (120, 0), (121, 0), (122, 1), (320, 100)])
def test_half_of_what_the_longest_request_leaves_may_be_preloaded(slots, most):
    assert Limits(slots, 4, 16, 100, 5, memory_slots=20).preloadable == most


def test_it_is_brought_in_before_anyone_asks_and_stays_while_others_come_and_go():
    traffic = Traffic(make_scheduler(slots=160, rows=2))
    scheduler = traffic.scheduler
    kept = payload("kept", 30)
    scheduler.space.preload(kept, "a")
    [load] = traffic.step().transfers
    assert (load.payload, load.extent.size, load.extent.end) == (kept, 30, 160)
    for number in range(20):
        traffic.add("a", 20, 5, payload(f"p{number}", 30))
        traffic.run(12)
        scheduler.check_integrity()
        assert "kept" in resident(scheduler)
    assert scheduler.residency.evictions > 10
    before = (scheduler.residency.hits, scheduler.residency.misses)
    traffic.add("a", 20, 5, kept)
    plan = traffic.step()
    assert not any(isinstance(transfer, Load) for transfer in plan.transfers)
    assert (scheduler.residency.hits, scheduler.residency.misses) == (before[0] + 1, before[1])


def test_without_a_preload_the_same_prefix_is_evicted():
    """The control of the test above."""
    traffic = Traffic(make_scheduler(slots=160, rows=2))
    traffic.add("a", 20, 5, payload("kept", 30))
    traffic.run(12)
    for number in range(20):
        traffic.add("a", 20, 5, payload(f"p{number}", 30))
        traffic.run(12)
    assert "kept" not in resident(traffic.scheduler)


def test_rows_make_way_for_it_and_go_on():
    traffic = Traffic(make_scheduler(slots=160, rows=4))
    names = [traffic.add(tenant, 30, 10) for tenant in "abcd"]
    traffic.run(6)
    assert traffic.scheduler.slots.used > 130
    traffic.scheduler.space.preload(payload("kept", 30), "a")
    traffic.step()
    assert "kept" in resident(traffic.scheduler)
    assert traffic.scheduler.admission.preemptions
    traffic.run(100)
    assert set(names) <= traffic.finished.keys()


def test_the_longest_request_still_fits_wherever_they_lie():
    """They are brought in between rows, so they lie in the middle; then nothing else may run, and they move."""
    traffic = Traffic(make_scheduler(slots=160, rows=4))
    scheduler = traffic.scheduler
    for number in range(3):
        traffic.add("a", 30, 20, payload(f"idle{number}", 10))
    traffic.run(3)
    for number in range(3):
        scheduler.space.preload(payload(f"kept{number}", 10), "a")
        traffic.run(2)
    traffic.run(60)
    name = traffic.add("b", 80, 15, payload("other", 5))
    traffic.run(40)
    assert name in traffic.finished
    assert {"kept0", "kept1", "kept2"} <= resident(scheduler)
    scheduler.check_integrity()


def test_released_it_gives_its_slots_back_unless_somebody_reads_it():
    traffic = Traffic(make_scheduler(slots=200))
    scheduler, kept = traffic.scheduler, payload("kept", 30)
    for holder in "ab":
        scheduler.space.preload(kept, holder)
    traffic.step()
    scheduler.space.release("kept", "a")
    assert scheduler.slots.used == 30
    traffic.add("a", 4, 10, kept)
    traffic.step()
    scheduler.space.release("kept", "b")
    assert resident(scheduler) == {"kept"}
    traffic.run(20)
    scheduler.space.release("kept", "b")
    assert scheduler.slots.used == 0
    scheduler.space.release("never heard of", "a")


def test_after_a_step_that_broke_it_comes_with_the_first_request_and_then_stays():
    """It may be what broke the step: it must not break every other one."""
    traffic = Traffic(make_scheduler(slots=160, rows=2))
    scheduler, kept = traffic.scheduler, payload("kept", 30)
    scheduler.space.preload(kept, "a")
    scheduler.schedule()
    scheduler.fail_running("broken")
    assert not scheduler.schedule().transfers
    traffic.add("a", 4, 2, kept)
    traffic.run(6)
    for number in range(20):
        traffic.add("a", 20, 5, payload(f"p{number}", 30))
        traffic.run(12)
    assert "kept" in resident(scheduler)
