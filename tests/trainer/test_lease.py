from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from prefix_store.errors import LeaseLost
from prefix_store.jobs import JobStatus, TrainingJob
from prefix_store.store import Store
from trainer.lease import Cancelled, Lease, Leases, Paused

EXAMPLES = [{"prompt": "a", "completion": "b"}]


@pytest.fixture
def store(tmp_path) -> Iterator[Store]:
    opened = Store.open(f"sqlite:///{tmp_path}/store.db")
    yield opened
    opened.close()


def claimed(store: Store, seconds: float = 60.0) -> TrainingJob:
    store.jobs.submit("acme", "one", EXAMPLES, {})
    job = store.jobs.claim("w1", seconds)
    assert job is not None
    return job


def now(store: Store, job: TrainingJob) -> TrainingJob:
    found = store.jobs.job("acme", job.id)
    assert found is not None
    return found


@contextmanager
def holding(store: Store, job: TrainingJob, seconds: float, every: float) -> Iterator[Lease]:
    with Leases(store, seconds, every) as leases:
        yield leases.take(job)


def soon(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.005)
    return holds()


def test_the_thread_keeps_the_lease_and_tells_the_news(store):
    job = claimed(store, 0.5)
    with holding(store, job, 60.0, 0.01) as lease:
        assert soon(lambda: now(store, job).lease_until > job.lease_until + 30)
        lease.check()
        lease.progress = {"step": 7}
        assert soon(lambda: now(store, job).progress == {"step": 7})


def test_news_need_not_wait_for_the_thread(store):
    job = claimed(store)
    with holding(store, job, 60.0, 60.0) as lease:
        lease.progress = {"step": 7}
        lease.beat()
        assert now(store, job).progress == {"step": 7}


def test_a_cancelled_job_is_noticed_by_the_thread(store):
    job = claimed(store)
    with holding(store, job, 60.0, 0.01) as lease:
        store.jobs.request_cancel("acme", job.id)
        assert soon(lambda: raises(Cancelled, lease))


def test_a_pause_is_noticed_and_so_is_its_end(store):
    job = claimed(store)
    with holding(store, job, 60.0, 0.01) as lease:
        store.jobs.request_pause("acme", job.id)
        assert soon(lambda: raises(Paused, lease))
        store.jobs.resume("acme", job.id)
        assert soon(lambda: not raises(Paused, lease))


def test_one_thread_keeps_all_and_no_more_than_those(store):
    first, second = claimed(store, 0.5), claimed(store, 0.5)
    with Leases(store, 60.0, 0.01) as leases:
        kept, dropped = leases.take(first), leases.take(second)
        for job in (first, second):
            assert soon(lambda job=job: now(store, job).lease_until > job.lease_until + 30)
        leases.drop(dropped)
        time.sleep(0.05)  # one more beat may have been under way
        still, moving = now(store, second).lease_until, now(store, first).lease_until
        assert soon(lambda: now(store, first).lease_until > moving)
        assert now(store, second).lease_until == still
        leases.hand_back()
        assert (now(store, first).status, now(store, second).status) == (JobStatus.QUEUED, JobStatus.RUNNING)
        assert kept.handed_back


def test_one_that_is_lost_costs_the_others_nothing(store):
    first, second = claimed(store, 0.5), claimed(store, 0.5)
    with Leases(store, 60.0, 0.01) as leases:
        lost, kept = leases.take(first), leases.take(second)
        store.jobs.finish(first, JobStatus.CANCELLED, None)
        assert soon(lambda: raises(LeaseLost, lost))
        assert soon(lambda: now(store, second).lease_until > second.lease_until + 30)
        kept.check()


def test_a_lost_job_is_noticed_by_the_thread(store):
    job = claimed(store)
    with holding(store, job, 60.0, 0.01) as lease:
        store.jobs.finish(job, JobStatus.QUEUED, None)
        assert soon(lambda: raises(LeaseLost, lease))


def test_a_job_handed_back_is_queued_and_no_longer_ours(store):
    job = claimed(store)
    with holding(store, job, 60.0, 60.0) as lease:
        lease.hand_back()
        assert now(store, job).status is JobStatus.QUEUED
        assert raises(LeaseLost, lease)
        lease.hand_back()


def test_heartbeats_that_end_are_not_silent(store, monkeypatch):
    job = claimed(store)
    with Leases(store, 60.0, 0.01) as leases:
        leases.take(job)
        leases.check()
        monkeypatch.setattr(store.jobs, "heartbeat", unforeseen)
        assert soon(lambda: raises(ZeroDivisionError, leases))


def unforeseen(*_: object) -> None:
    raise ZeroDivisionError


def raises(kind: type[Exception], checked: Lease | Leases) -> bool:
    try:
        checked.check()
    except kind:
        return True
    return False
