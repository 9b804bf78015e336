import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefix_store.errors import Overloaded
from server.scheduler.service import Service
from server.scheduler.waiting import WaitingQueue
from tests.server.scheduler.traffic import make_sequence


def served(**tenants: int) -> Service:
    service = Service()
    for tenant, received in tenants.items():
        service.lift(tenant, received)
    return service


def test_a_line_is_first_come_first_served_and_what_was_preempted_comes_first():
    queue = WaitingQueue(10, Service())
    first, second, preempted = (make_sequence("a") for _ in range(3))
    for sequence in (first, second):
        queue.push(sequence)
    queue.push_front(preempted)
    assert list(queue) == [preempted, first, second]
    queue.remove(first)
    assert queue.lines[0].first is preempted
    assert list(queue.lines[0]) == [preempted, second]


def test_a_line_without_anybody_is_gone():
    queue = WaitingQueue(10, Service())
    sequence = make_sequence("a")
    queue.push(sequence)
    queue.remove(sequence)
    assert (len(queue), queue.lines) == (0, [])


def test_who_begins_to_wait_is_lifted_to_the_least_of_those_who_do():
    service = served(a=50, b=30, c=10, d=40)
    queue = WaitingQueue(10, service)
    for tenant in "abcd":
        queue.push(make_sequence(tenant))
    # c found a and b waiting, and b the last to begin; d was above the least already
    assert [service.received(tenant) for tenant in "abcd"] == [50, 50, 50, 50]


def test_who_begins_to_wait_alone_is_lifted_to_whoever_waited_last():
    service = served(a=5)
    queue = WaitingQueue(10, service)
    sequence = make_sequence("a")
    queue.push(sequence)
    queue.remove(sequence)
    service.lift("a", 70)  # served since
    queue.push(make_sequence("b"))
    assert service.received("b") == 70


def test_only_who_has_its_share_of_a_full_queue_is_refused():
    queue = WaitingQueue(6, Service())
    for _ in range(6):
        queue.push(make_sequence("a"))
    with pytest.raises(Overloaded, match="6 requests are waiting already; try again later"):
        queue.push(make_sequence("a"))
    for _ in range(3):
        queue.push(make_sequence("b"))
    with pytest.raises(Overloaded, match="9 requests are waiting already, 3 of them yours; try"):
        queue.push(make_sequence("b"))
    for _ in range(2):
        queue.push(make_sequence("c"))
    with pytest.raises(Overloaded, match="2 of them yours"):
        queue.push(make_sequence("c"))
    queue.push_front(make_sequence("a"))


@given(
    limit=st.integers(1, 12),
    operations=st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans(), st.integers(0, 99)), max_size=150),
)
def test_the_queue_is_bounded_and_every_tenant_has_a_place_in_it(limit, operations):
    queue = WaitingQueue(limit, Service())
    for tenant, leaves, number in operations:
        waiting = list(queue)
        if leaves and waiting:
            queue.remove(waiting[number % len(waiting)])
            continue
        own = sum(sequence.request.tenant == tenant for sequence in waiting)
        try:
            queue.push(make_sequence(tenant))
        except Overloaded:
            assert own > 0
            assert len(waiting) >= limit
        queue.check_integrity()
        tenants = len(queue.lines)
        assert len(queue) <= limit + sum(max(1, limit // place) for place in range(2, tenants + 1))
