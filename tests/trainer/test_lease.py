from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from prefix_store.errors import LeaseLost
from prefix_store.jobs import JobStatus, TrainingJob
from prefix_store.store import Store
from trainer.lease import Cancelled, Lease

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


def soon(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.005)
    return holds()


def test_the_thread_keeps_the_lease_and_tells_the_news(store):
    job = claimed(store, 0.5)
    with Lease(store, job, 60.0, 0.01) as lease:
        assert soon(lambda: now(store, job).lease_until > job.lease_until + 30)
        lease.check()
        lease.progress = {"step": 7}
        assert soon(lambda: now(store, job).progress == {"step": 7})


def test_news_need_not_wait_for_the_thread(store):
    job = claimed(store)
    with Lease(store, job, 60.0, 60.0) as lease:
        lease.progress = {"step": 7}
        lease.beat()
        assert now(store, job).progress == {"step": 7}


def test_a_cancelled_job_is_noticed_by_the_thread(store):
    job = claimed(store)
    with Lease(store, job, 60.0, 0.01) as lease:
        store.jobs.request_cancel("acme", job.id)
        assert soon(lambda: raises(Cancelled, lease))


def test_a_lost_job_is_noticed_by_the_thread(store):
    job = claimed(store)
    with Lease(store, job, 60.0, 0.01) as lease:
        store.jobs.finish(job, JobStatus.QUEUED, None)
        assert soon(lambda: raises(LeaseLost, lease))


def test_a_job_handed_back_is_queued_and_no_longer_ours(store):
    job = claimed(store)
    with Lease(store, job, 60.0, 60.0) as lease:
        lease.hand_back()
        assert now(store, job).status is JobStatus.QUEUED
        assert raises(LeaseLost, lease)
        lease.hand_back()


def raises(kind: type[Exception], lease: Lease) -> bool:
    try:
        lease.check()
    except kind:
        return True
    return False
