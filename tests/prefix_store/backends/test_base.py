"""The contract that `backends.base.Backend` states, for every backend."""

import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from prefix_store.errors import Conflict, JobNotFound, LeaseLost, StoreUnavailable
from prefix_store.jobs import MAX_ATTEMPTS, JobError, JobStatus
from prefix_store.prefix import Method
from prefix_store.tenants import new_key
from tests.prefix_store.backends.openers import OPENERS
from tests.prefix_store.backends.publisher import MANIFEST, digest_of
from tests.prefix_store.samples import SPEC, Clock

ROOT = Path(__file__).parents[3]
LEASE = 60.0
LOST = JobError("worker_lost", f"the worker stopped answering in each of {MAX_ATTEMPTS} attempts")


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(params=OPENERS)
def kind(request):
    return request.param


@pytest.fixture
def backend(kind, tmp_path, clock):
    opened = OPENERS[kind](tmp_path, clock)
    yield opened
    opened.close()


def publish(backend, name="support", tenant="acme", digest="a", job=None):
    return backend.publish(tenant, name, MANIFEST, digest * 64, 10, job)


def enqueue(backend, *ids, tenant="acme"):
    for job_id in ids:
        backend.enqueue(job_id, tenant, "support", SPEC)


def numbers(versions):
    return [(version.name, version.version) for version in versions]


# prefixes


def test_versions_count_from_one_and_the_last_is_current(backend, clock):
    first = publish(backend)
    clock.now += 5
    second = publish(backend, digest="b")
    assert (first.version, second.version) == (1, 2)
    assert (second.created_at, second.digest, second.size_bytes) == (1005.0, "b" * 64, 10)
    assert (second.method, second.virtual_tokens, second.job_id) == (Method.PREFIX, 5, None)
    assert backend.version("acme", "support", None) == second
    assert backend.version("acme", "support", 1) == first


def test_what_is_not_there_is_none(backend):
    publish(backend)
    assert backend.version("acme", "support", 2) is None
    assert backend.version("acme", "other", None) is None
    assert backend.version("other", "support", None) is None


def test_pages_hold_current_versions_in_name_order(backend):
    for name in ["c", "a", "b", "a"]:
        publish(backend, name)
    publish(backend, "foreign", tenant="other")
    assert numbers(backend.current_versions("acme", "", 2)) == [("a", 2), ("b", 1)]
    assert numbers(backend.current_versions("acme", "b", 2)) == [("c", 1)]


def test_deleting_the_current_version_uncovers_the_one_below(backend):
    for _ in range(3):
        publish(backend)
    assert numbers(backend.delete("acme", "support", 3)) == [("support", 3)]
    assert backend.version("acme", "support", None).version == 2
    assert numbers(backend.delete("acme", "support", 1)) == [("support", 1)]
    assert numbers(backend.current_versions("acme", "", 10)) == [("support", 2)]


def test_version_numbers_are_never_used_again(backend):
    publish(backend)
    publish(backend)
    backend.delete("acme", "support", 2)
    assert publish(backend).version == 3
    assert numbers(backend.delete("acme", "support", None)) == [("support", 1), ("support", 3)]
    assert backend.version("acme", "support", None) is None
    assert publish(backend).version == 4


def test_deleting_nothing_removes_nothing(backend):
    publish(backend)
    assert backend.delete("other", "support", None) == []
    assert backend.delete("acme", "support", 9) == []
    assert backend.version("acme", "support", None).version == 1


def test_a_name_is_remembered_after_its_versions_are_gone(backend):
    assert not backend.ever_published("acme", "support")
    publish(backend)
    backend.delete("acme", "support", None)
    assert backend.ever_published("acme", "support")
    assert not backend.ever_published("other", "support")


def test_digests_are_those_of_prefixes_and_training_data(backend):
    publish(backend, digest="a")
    publish(backend, digest="b")
    backend.delete("acme", "support", 1)
    enqueue(backend, "ftjob-1")
    assert backend.digests() == {"b" * 64, SPEC.data_digest}


# publishing a job's result


def test_publishing_ends_the_job(backend, clock):
    enqueue(backend, "ftjob-1")
    job = backend.claim("w", LEASE)
    clock.now += 7
    version = publish(backend, job=job)
    ended = backend.job("acme", "ftjob-1")
    assert version.job_id == "ftjob-1"
    assert (ended.status, ended.version, ended.finished_at) == (JobStatus.SUCCEEDED, 1, 1007.0)
    assert ended.lease_until is None


def test_publishing_a_job_twice_is_publishing_it_once(backend):
    enqueue(backend, "ftjob-1")
    job = backend.claim("w", LEASE)
    first = publish(backend, job=job)
    publish(backend)
    assert publish(backend, job=job) == first
    assert backend.version("acme", "support", None).version == 2


def test_only_the_last_claimant_may_publish(backend, clock):
    enqueue(backend, "ftjob-1")
    stale = backend.claim("w1", LEASE)
    clock.now += LEASE
    fresh = backend.claim("w2", LEASE)
    with pytest.raises(LeaseLost):
        publish(backend, job=stale)
    assert not backend.ever_published("acme", "support")
    assert publish(backend, job=fresh).version == 1


def test_a_job_that_has_ended_publishes_nothing(backend):
    enqueue(backend, "ftjob-1")
    job = backend.claim("w", LEASE)
    backend.finish(job, JobStatus.FAILED, JobError("oom", "out of memory"))
    with pytest.raises(LeaseLost):
        publish(backend, job=job)
    assert not backend.ever_published("acme", "support")


# the queue


def test_a_new_job_waits(backend):
    job = backend.enqueue("ftjob-1", "acme", "support", SPEC)
    assert job == backend.job("acme", "ftjob-1")
    assert (job.status, job.created_at, job.attempt, job.fence) == (JobStatus.QUEUED, 1000.0, 0, 0)
    assert job.spec == SPEC
    assert backend.job("other", "ftjob-1") is None


def test_a_job_id_is_taken_once(backend):
    enqueue(backend, "ftjob-1")
    with pytest.raises(Conflict):
        enqueue(backend, "ftjob-1")


def test_a_claim_makes_it_run(backend, clock):
    enqueue(backend, "ftjob-1")
    clock.now += 3
    job = backend.claim("w", LEASE)
    assert job == backend.job("acme", "ftjob-1")
    assert (job.status, job.worker, job.attempt, job.fence) == (JobStatus.RUNNING, "w", 1, 1)
    assert (job.started_at, job.lease_until) == (1003.0, 1063.0)
    assert backend.claim("w", LEASE) is None


def test_jobs_of_one_tenant_are_claimed_in_order(backend):
    enqueue(backend, "ftjob-2", "ftjob-1", "ftjob-3")
    assert [backend.claim("w", LEASE).id for _ in range(3)] == ["ftjob-2", "ftjob-1", "ftjob-3"]


def test_the_least_busy_tenant_goes_first(backend):
    enqueue(backend, "a1", "a2", "a3", tenant="a")
    enqueue(backend, "b1", "b2", tenant="b")
    assert [backend.claim("w", LEASE).id for _ in range(5)] == ["a1", "b1", "a2", "b2", "a3"]


def test_a_tenant_whose_workers_are_gone_is_not_busy(backend, clock):
    enqueue(backend, "a1", "a2", tenant="a")
    backend.claim("w", LEASE)
    clock.now += LEASE
    enqueue(backend, "b1", tenant="b")
    assert backend.claim("w", LEASE).id == "a1"


def test_a_heartbeat_extends_the_lease_and_records_progress(backend, clock):
    enqueue(backend, "ftjob-1")
    job = backend.claim("w", LEASE)
    clock.now += LEASE - 1
    assert not backend.heartbeat(job, LEASE, {"step": 3, "loss": 0.5}).cancel_requested
    clock.now += LEASE - 1
    assert backend.claim("w2", LEASE) is None
    beaten = backend.job("acme", "ftjob-1")
    assert (beaten.progress, beaten.lease_until) == ({"step": 3, "loss": 0.5}, 1059.0 + LEASE)


def test_a_lapsed_lease_gives_the_job_to_the_next_worker(backend, clock):
    enqueue(backend, "ftjob-1")
    stale = backend.claim("w1", LEASE)
    clock.now += LEASE
    fresh = backend.claim("w2", LEASE)
    assert (fresh.id, fresh.worker, fresh.attempt, fresh.fence) == ("ftjob-1", "w2", 2, 2)
    assert fresh.started_at == stale.started_at
    for write in [
        lambda: backend.heartbeat(stale, LEASE, {}),
        lambda: backend.add_event(stale, "message", {}),
        lambda: backend.finish(stale, JobStatus.SUCCEEDED, None),
    ]:
        with pytest.raises(LeaseLost):
            write()
    assert backend.job("acme", "ftjob-1") == fresh


def test_a_slow_worker_keeps_what_nobody_else_has_claimed(backend, clock):
    enqueue(backend, "ftjob-1")
    job = backend.claim("w", LEASE)
    clock.now += 10 * LEASE
    backend.heartbeat(job, LEASE, {})
    assert backend.claim("w2", LEASE) is None


def test_a_job_that_kills_its_workers_fails_in_the_end(backend, clock):
    enqueue(backend, "ftjob-1")
    for attempt in range(1, MAX_ATTEMPTS + 1):
        assert backend.claim("w", LEASE).attempt == attempt
        clock.now += LEASE
    enqueue(backend, "ftjob-2")
    assert backend.claim("w", LEASE).id == "ftjob-2"
    failed = backend.job("acme", "ftjob-1")
    assert (failed.status, failed.error, failed.finished_at) == (JobStatus.FAILED, LOST, clock.now)


def test_a_job_handed_back_gets_its_attempt_back(backend):
    enqueue(backend, "ftjob-1")
    for fence in range(1, MAX_ATTEMPTS + 3):
        job = backend.claim("w", LEASE)
        assert (job.attempt, job.fence) == (1, fence)
        returned = backend.finish(job, JobStatus.QUEUED, None)
        assert (returned.status, returned.lease_until, returned.finished_at) == (JobStatus.QUEUED, None, None)


def test_a_failure_is_kept_with_its_reason(backend):
    enqueue(backend, "ftjob-1")
    error = JobError("invalid_training_file", "line 3: the completion is empty")
    failed = backend.finish(backend.claim("w", LEASE), JobStatus.FAILED, error)
    assert failed == backend.job("acme", "ftjob-1")
    assert (failed.status, failed.error, failed.finished_at) == (JobStatus.FAILED, error, 1000.0)


def test_a_running_job_cannot_be_finished_as_running(backend):
    enqueue(backend, "ftjob-1")
    job = backend.claim("w", LEASE)
    with pytest.raises(Conflict):
        backend.finish(job, JobStatus.RUNNING, None)
    assert backend.job("acme", "ftjob-1") == job


# cancelling


def test_a_queued_job_is_cancelled_at_once(backend):
    enqueue(backend, "ftjob-1")
    cancelled = backend.request_cancel("acme", "ftjob-1")
    assert cancelled == backend.job("acme", "ftjob-1")
    assert (cancelled.status, cancelled.finished_at) == (JobStatus.CANCELLED, 1000.0)
    assert backend.claim("w", LEASE) is None


def test_a_running_job_is_told_at_its_heartbeat(backend):
    enqueue(backend, "ftjob-1")
    job = backend.claim("w", LEASE)
    flagged = backend.request_cancel("acme", "ftjob-1")
    assert (flagged.status, flagged.cancel_requested) == (JobStatus.RUNNING, True)
    assert backend.heartbeat(job, LEASE, {}).cancel_requested
    assert backend.finish(job, JobStatus.CANCELLED, None).status is JobStatus.CANCELLED


def test_a_paused_job_can_be_cancelled(backend):
    enqueue(backend, "ftjob-1")
    assert backend.finish(backend.claim("w", LEASE), JobStatus.PAUSED, None).status is JobStatus.PAUSED
    assert backend.claim("w", LEASE) is None
    assert backend.request_cancel("acme", "ftjob-1").status is JobStatus.CANCELLED


def test_handing_back_a_cancelled_job_ends_it(backend):
    enqueue(backend, "ftjob-1")
    job = backend.claim("w", LEASE)
    backend.request_cancel("acme", "ftjob-1")
    assert backend.finish(job, JobStatus.QUEUED, None).status is JobStatus.CANCELLED


def test_a_cancelled_job_does_not_outlive_its_worker(backend, clock):
    enqueue(backend, "ftjob-1")
    backend.claim("w", LEASE)
    backend.request_cancel("acme", "ftjob-1")
    clock.now += LEASE
    assert backend.claim("w", LEASE) is None
    assert backend.job("acme", "ftjob-1").status is JobStatus.CANCELLED


def test_a_job_may_finish_before_it_hears_of_its_cancelling(backend):
    enqueue(backend, "ftjob-1")
    job = backend.claim("w", LEASE)
    backend.request_cancel("acme", "ftjob-1")
    publish(backend, job=job)
    assert backend.job("acme", "ftjob-1").status is JobStatus.SUCCEEDED


@pytest.mark.parametrize("status", [status for status in JobStatus if status.is_final])
def test_what_is_final_cannot_be_cancelled(backend, status):
    enqueue(backend, "ftjob-1")
    backend.finish(backend.claim("w", LEASE), status, None)
    with pytest.raises(Conflict, match=status):
        backend.request_cancel("acme", "ftjob-1")


def test_an_unknown_and_a_foreign_job_are_told_apart_by_nothing(backend):
    enqueue(backend, "ftjob-1")
    with pytest.raises(JobNotFound) as unknown:
        backend.request_cancel("acme", "ftjob-2")
    with pytest.raises(JobNotFound) as foreign:
        backend.request_cancel("other", "ftjob-1")
    assert unknown.value.message.replace("ftjob-2", "ftjob-1") == foreign.value.message


# looking at jobs


def test_jobs_are_listed_newest_first(backend):
    enqueue(backend, "ftjob-1", "ftjob-2", "ftjob-3")
    enqueue(backend, "ftjob-4", tenant="other")
    assert [job.id for job in backend.jobs("acme", None, 2)] == ["ftjob-3", "ftjob-2"]
    assert [job.id for job in backend.jobs("acme", "ftjob-2", 2)] == ["ftjob-1"]
    assert backend.jobs("acme", "ftjob-4", 2) == []


def test_job_counts_name_every_status(backend):
    enqueue(backend, "ftjob-1", "ftjob-2", tenant="a")
    enqueue(backend, "ftjob-3", tenant="b")
    backend.claim("w", LEASE)
    assert backend.job_counts() == {
        **dict.fromkeys(JobStatus, 0),
        JobStatus.QUEUED: 2,
        JobStatus.RUNNING: 1,
    }


def test_events_are_numbered_within_their_job(backend, clock):
    enqueue(backend, "ftjob-1", "ftjob-2")
    first, second = backend.claim("w", LEASE), backend.claim("w", LEASE)
    backend.add_event(first, "message", {"message": "started"})
    clock.now += 1
    backend.add_event(second, "message", {})
    backend.add_event(first, "metrics", {"step": 1, "train_loss": 2.5})
    events = backend.events("acme", "ftjob-1", 0, 10)
    assert [(event.sequence, event.kind, event.created_at) for event in events] == [
        (1, "message", 1000.0),
        (2, "metrics", 1001.0),
    ]
    assert events[1].data == {"step": 1, "train_loss": 2.5}
    assert backend.events("acme", "ftjob-1", 1, 10) == events[1:]
    assert backend.events("acme", "ftjob-1", 0, 1) == events[:1]
    assert backend.events("other", "ftjob-1", 0, 10) == []


# keys


def test_keys_are_kept_and_removed(backend):
    _, old = new_key("acme", frozenset({"generate", "train"}), 1.0)
    _, new = new_key("other", frozenset({"admin"}), 2.0)
    for key in (new, old):
        backend.add_key(key)
    assert backend.key(old.id) == old
    assert list(backend.keys()) == [old, new]
    assert backend.remove_key(old.id)
    assert not backend.remove_key(old.id)
    assert backend.key(old.id) is None


# the store as a whole


def test_everything_survives_reopening(kind, tmp_path, backend, clock):
    enqueue(backend, "ftjob-1")
    version = publish(backend, job=backend.claim("w", LEASE))
    job = backend.job("acme", "ftjob-1")
    backend.close()
    again = OPENERS[kind](tmp_path, clock)
    assert again.version("acme", "support", 1) == version
    assert again.job("acme", "ftjob-1") == job
    again.close()


def test_a_closed_store_does_not_answer(backend):
    backend.ping()
    backend.close()
    with pytest.raises(StoreUnavailable):
        backend.ping()


def test_threads_share_a_backend(backend):
    enqueue(backend, *(f"ftjob-{index}" for index in range(24)))
    claimed: list[str] = []

    def work():
        while (job := backend.claim("w", LEASE)) is not None:
            publish(backend, job=job)
            claimed.append(job.id)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed) == len(set(claimed)) == 24
    assert backend.version("acme", "support", None).version == 24


def test_processes_share_a_store(kind, tmp_path):
    """Four processes and this one publish to one name, and jobs' results to another, from before the store exists."""
    workers, each, jobs = 4, 40, 40
    command = [sys.executable, "-m", "tests.prefix_store.backends.publisher", kind, str(tmp_path)]
    running = [subprocess.Popen([*command, f"w{index}", str(each)], cwd=ROOT) for index in range(workers)]
    backend = OPENERS[kind](tmp_path, time.time)
    enqueue(backend, *(f"ftjob-{index}" for index in range(jobs)))
    while (job := backend.claim("here", LEASE)) is not None:
        publish(backend, job=job)
    assert [process.wait(60) for process in running] == [0] * workers

    versions = [backend.version("acme", "shared", number) for number in range(1, workers * each + 1)]
    assert Counter(version.digest for version in versions) == Counter(
        digest_of(f"w{worker}", index) for worker in range(workers) for index in range(each)
    )
    assert backend.version("acme", "shared", workers * each + 1) is None
    ended = backend.jobs("acme", None, 1000)
    assert Counter((job.status, job.attempt, job.fence) for job in ended) == {(JobStatus.SUCCEEDED, 1, 1): jobs}
    assert sorted(job.version for job in ended) == list(range(1, jobs + 1))
    backend.close()
