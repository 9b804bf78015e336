"""The leased queue, on every backend."""

import threading

import pytest

from prefix_store import checkup
from prefix_store.catalog import Catalog
from prefix_store.errors import (
    Conflict,
    InvalidRequest,
    JobNotFound,
    LeaseLost,
    QuotaExceeded,
    StoreCorrupt,
    StoreUnavailable,
)
from prefix_store.job_queue import LOST
from prefix_store.jobs import MAX_ATTEMPTS, JobError, JobStatus
from tests.prefix_store import invariants
from tests.prefix_store.samples import SPEC, damage, enqueue, publish

LEASE = 60.0


@pytest.fixture
def queue(store):
    yield store.jobs
    invariants.check(store.backend)


def test_a_new_job_waits(backend, queue):
    enqueue(backend, "ftjob-1")
    job = queue.job("acme", "ftjob-1")
    assert (job.status, job.created_at, job.attempt, job.fence) == (JobStatus.QUEUED, 1000.0, 0, 0)
    assert job.spec == SPEC
    assert queue.job("other", "ftjob-1") is None


def test_a_job_id_is_taken_once(backend, queue):
    enqueue(backend, "ftjob-1")
    with pytest.raises(Conflict):
        enqueue(backend, "ftjob-1")


def test_a_claim_makes_it_run(backend, queue, clock):
    enqueue(backend, "ftjob-1")
    clock.now += 3
    job = queue.claim("w", LEASE)
    assert job == queue.job("acme", "ftjob-1")
    assert (job.status, job.worker, job.attempt, job.fence) == (JobStatus.RUNNING, "w", 1, 1)
    assert (job.started_at, job.lease_until) == (1003.0, 1063.0)
    assert queue.claim("w", LEASE) is None


def test_jobs_of_one_tenant_are_claimed_in_order(backend, queue):
    enqueue(backend, "ftjob-2", "ftjob-1", "ftjob-3")
    assert [queue.claim("w", LEASE).id for _ in range(3)] == ["ftjob-2", "ftjob-1", "ftjob-3"]


def test_the_least_busy_tenant_goes_first(backend, queue):
    enqueue(backend, "a1", "a2", "a3", tenant="a")
    enqueue(backend, "b1", "b2", tenant="b")
    enqueue(backend, "c1", tenant="a-b")  # whose key sorts before that of a
    assert [queue.claim("w", LEASE).id for _ in range(6)] == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_tenants_wait_while_they_have_a_job_that_does(backend, queue):
    assert queue.waiting() == set()
    enqueue(backend, "a1", "a2", tenant="a")
    enqueue(backend, "b1", tenant="a-b")
    assert queue.waiting() == {"a", "a-b"}
    for _ in range(2):
        queue.claim("w", LEASE)
    assert queue.waiting() == {"a"}


def test_a_tenant_whose_workers_are_gone_is_not_busy(backend, queue, clock):
    enqueue(backend, "a1", "a2", tenant="a")
    queue.claim("w", LEASE)
    clock.now += LEASE
    enqueue(backend, "b1", tenant="b")
    assert queue.claim("w", LEASE).id == "a1"


# what a worker can take


def of_model(base: str, *methods: str):
    """What a worker takes that has this base model, and these methods."""
    return lambda needs: needs.base_digest in (None, base * 64) and needs.method in methods


A, B = of_model("a", "prefix", "prompt"), of_model("b", "prefix", "low_rank")


def claimed(queue, takes, times=1):
    """The ids of so many claims."""
    jobs = [queue.claim("w", LEASE, takes) for _ in range(times)]
    return [job.id if job is not None else None for job in jobs]


def test_two_workers_of_two_models_each_take_what_is_for_them(backend, queue):
    enqueue(backend, "a1", "a2", base_digest="a" * 64)
    enqueue(backend, "b1", base_digest="b" * 64)
    enqueue(backend, "any")
    enqueue(backend, "rank", method="low_rank")
    assert claimed(queue, B, 2) == ["b1", "any"]
    assert claimed(queue, A, 3) == ["a1", "a2", None]
    assert queue.passed_by == 1
    assert claimed(queue, B, 2) == ["rank", None]
    assert queue.passed_by == 0


def test_a_job_that_nobody_takes_waits_and_keeps_nobody_else_waiting(backend, queue, clock):
    enqueue(backend, "misfit", base_digest="c" * 64)
    enqueue(backend, "mine")
    enqueue(backend, "other", tenant="other", method="plugged")
    clock.now += 1
    assert queue.waiting(A) == {"acme"}
    assert claimed(queue, A, 2) == ["mine", None]
    assert (queue.passed_by, queue.waiting(A)) == (2, set())
    assert {queue.job("acme", "misfit").status, queue.job("other", "other").status} == {JobStatus.QUEUED}


def test_what_is_for_others_may_be_more_than_a_page(backend, queue, monkeypatch):
    monkeypatch.setattr("prefix_store.job_queue.PAGE", 2)
    for tenant in ("a", "b", "c"):
        enqueue(backend, *(f"{tenant}{number}" for number in range(5)), tenant=tenant, base_digest="c" * 64)
    enqueue(backend, "mine", "mine-too", tenant="b")
    assert queue.waiting(A) == {"b"}
    assert claimed(queue, A, 3) == ["mine", "mine-too", None]
    assert queue.passed_by == 15


def test_a_lapsed_job_is_tried_again_by_who_takes_it_and_ended_by_anybody(backend, queue, clock):
    enqueue(backend, "again", "cancelled", "paused", base_digest="a" * 64)
    claimed(queue, A, 3)
    queue.request_cancel("acme", "cancelled")
    queue.request_pause("acme", "paused")
    clock.now += LEASE
    assert claimed(queue, B) == [None]
    found = [queue.job("acme", job_id).status for job_id in ("again", "cancelled", "paused")]
    assert found == [JobStatus.RUNNING, JobStatus.CANCELLED, JobStatus.PAUSED]
    for _ in range(MAX_ATTEMPTS - 1):
        assert claimed(queue, A) == ["again"]
        clock.now += LEASE
    assert claimed(queue, B) == [None]
    assert queue.job("acme", "again").error == LOST


def test_entries_that_an_older_version_wrote_are_read_once_and_written_anew(backend, queue):
    enqueue(backend, "a1", base_digest="a" * 64)
    enqueue(backend, "b1", "b2", base_digest="b" * 64)

    def age(transaction):
        for key, entry in transaction.scan("queued/"):
            transaction.put(f"queued/{key}", {name: entry[name] for name in ("job", "at", "until")})

    backend.write(age)
    assert queue.waiting(B) == {"acme"}
    assert claimed(queue, A, 2) == ["a1", None]
    with backend.view() as view:
        assert [entry["base"] for _, entry in view.scan("queued/")] == ["b" * 64] * 2
    assert claimed(queue, B, 2) == ["b1", "b2"]


# turns


def test_who_has_had_a_turn_comes_behind_who_waits(backend, queue, clock):
    enqueue(backend, "a1", "a2", tenant="a")
    clock.now += 1
    enqueue(backend, "b1", tenant="b")
    taken = []
    for _ in range(4):
        job = queue.claim("w", LEASE)
        taken.append(job.id)
        clock.now += 1
        assert queue.make_way(job).attempt == 0
    assert taken == ["a1", "b1", "a1", "b1"]


def test_a_tenant_of_many_short_jobs_takes_turns_too(backend, queue, clock):
    enqueue(backend, "a1", "a2", "a3", tenant="a")
    clock.now += 1
    enqueue(backend, "b1", "b2", tenant="b")
    taken = []
    for _ in range(5):
        job = queue.claim("w", LEASE)
        taken.append(job.id)
        clock.now += 1
        publish(backend, tenant=job.tenant, job=job)
    assert taken == ["a1", "b1", "a2", "b2", "a3"]


def test_who_comes_anew_is_behind_who_has_waited_for_another_turn(backend, queue, clock):
    enqueue(backend, "a1", tenant="a")
    queue.make_way(queue.claim("w", LEASE))
    clock.now += 1
    enqueue(backend, "b1", tenant="b")
    assert queue.claim("w", LEASE).id == "a1"


def test_a_job_that_makes_way_is_ended_where_its_owner_wants_that(backend, queue):
    enqueue(backend, "ftjob-1")
    job = queue.claim("w", LEASE)
    queue.request_cancel("acme", "ftjob-1")
    assert queue.make_way(job).status is JobStatus.CANCELLED
    with pytest.raises(LeaseLost):
        queue.make_way(job)


def test_who_is_busy_is_counted_while_leases_hold(backend, queue, clock):
    enqueue(backend, "a1", "a2", tenant="a")
    enqueue(backend, "b1", tenant="b")
    for _ in range(3):
        queue.claim("w", LEASE)
    assert queue.busy() == {"a": 2, "b": 1}
    clock.now += LEASE
    assert not queue.busy()


def test_a_heartbeat_extends_the_lease_and_records_progress(backend, queue, clock):
    enqueue(backend, "ftjob-1")
    job = queue.claim("w", LEASE)
    clock.now += LEASE - 1
    assert not queue.heartbeat(job, LEASE, {"step": 3, "loss": 0.5}).cancel_requested
    clock.now += LEASE - 1
    assert queue.claim("w2", LEASE) is None
    beaten = queue.job("acme", "ftjob-1")
    assert (job.heartbeat_at, beaten.heartbeat_at) == (1000.0, 1059.0)
    assert (beaten.progress, beaten.lease_until) == ({"step": 3, "loss": 0.5}, 1059.0 + LEASE)


def test_a_lapsed_lease_gives_the_job_to_the_next_worker(backend, queue, clock):
    enqueue(backend, "ftjob-1")
    stale = queue.claim("w1", LEASE)
    clock.now += LEASE
    fresh = queue.claim("w2", LEASE)
    assert (fresh.id, fresh.worker, fresh.attempt, fresh.fence) == ("ftjob-1", "w2", 2, 2)
    assert fresh.started_at == stale.started_at
    for write in [
        lambda: queue.heartbeat(stale, LEASE, {}),
        lambda: queue.add_event(stale, "message", {}),
        lambda: queue.finish(stale, JobStatus.SUCCEEDED, None),
    ]:
        with pytest.raises(LeaseLost):
            write()
    assert queue.job("acme", "ftjob-1") == fresh


def test_a_slow_worker_keeps_what_nobody_else_has_claimed(backend, queue, clock):
    enqueue(backend, "ftjob-1")
    job = queue.claim("w", LEASE)
    clock.now += 10 * LEASE
    queue.heartbeat(job, LEASE, {})
    assert queue.claim("w2", LEASE) is None


def test_a_job_that_kills_its_workers_fails_in_the_end(backend, queue, clock):
    enqueue(backend, "ftjob-1")
    for attempt in range(1, MAX_ATTEMPTS + 1):
        assert queue.claim("w", LEASE).attempt == attempt
        clock.now += LEASE
    enqueue(backend, "ftjob-2")
    assert queue.claim("w", LEASE).id == "ftjob-2"
    failed = queue.job("acme", "ftjob-1")
    assert (failed.status, failed.error, failed.finished_at) == (JobStatus.FAILED, LOST, clock.now)


def test_several_lapsed_jobs_end_in_one_claim(backend, queue, clock):
    enqueue(backend, "ftjob-1", "ftjob-2", "ftjob-3")
    for _ in range(MAX_ATTEMPTS):
        for _ in range(3):
            queue.claim("w", LEASE)
        clock.now += LEASE
    assert queue.claim("w", LEASE) is None
    assert queue.job_counts()[JobStatus.FAILED] == 3


def test_leases_that_ran_out_are_counted_by_who_finds_them(backend, queue, clock):
    enqueue(backend, "ftjob-1", "ftjob-2")
    first = queue.claim("w1", LEASE)
    assert (queue.overdue(), queue.lapsed) == (0, 0)
    clock.now += LEASE
    assert queue.overdue() == 1
    queue.claim("w2", LEASE)
    assert (queue.overdue(), queue.lapsed) == (0, 1), "taken over"
    second = queue.claim("w2", LEASE)
    queue.finish(second, JobStatus.QUEUED, None)
    queue.claim("w2", LEASE)
    assert queue.lapsed == 1, "what is handed back in good order has not run out"
    queue.request_cancel("acme", first.id)
    clock.now += LEASE
    while queue.claim("w3", LEASE) is not None:
        pass
    assert (queue.overdue(), queue.lapsed) == (0, 3), "one taken over, one that nobody wants any more ended"


def test_a_job_handed_back_gets_its_attempt_back(backend, queue):
    enqueue(backend, "ftjob-1")
    for fence in range(1, MAX_ATTEMPTS + 3):
        job = queue.claim("w", LEASE)
        assert (job.attempt, job.fence) == (1, fence)
        returned = queue.finish(job, JobStatus.QUEUED, None)
        assert (returned.status, returned.lease_until, returned.finished_at) == (JobStatus.QUEUED, None, None)


def test_a_job_handed_back_keeps_its_place(backend, queue):
    enqueue(backend, "ftjob-1", "ftjob-2")
    queue.finish(queue.claim("w", LEASE), JobStatus.QUEUED, None)
    assert queue.claim("w", LEASE).id == "ftjob-1"


def test_a_failure_is_kept_with_its_reason(backend, queue):
    enqueue(backend, "ftjob-1")
    error = JobError("invalid_training_file", "line 3: the completion is empty")
    failed = queue.finish(queue.claim("w", LEASE), JobStatus.FAILED, error)
    assert failed == queue.job("acme", "ftjob-1")
    assert (failed.status, failed.error, failed.finished_at) == (JobStatus.FAILED, error, 1000.0)


def test_a_running_job_cannot_be_finished_as_running(backend, queue):
    enqueue(backend, "ftjob-1")
    job = queue.claim("w", LEASE)
    with pytest.raises(Conflict):
        queue.finish(job, JobStatus.RUNNING, None)
    assert queue.job("acme", "ftjob-1") == job


# cancelling


def test_a_queued_job_is_cancelled_at_once(backend, queue):
    enqueue(backend, "ftjob-1")
    cancelled = queue.request_cancel("acme", "ftjob-1")
    assert cancelled == queue.job("acme", "ftjob-1")
    assert (cancelled.status, cancelled.finished_at) == (JobStatus.CANCELLED, 1000.0)
    assert queue.claim("w", LEASE) is None


def test_a_running_job_is_told_at_its_heartbeat(backend, queue):
    enqueue(backend, "ftjob-1")
    job = queue.claim("w", LEASE)
    flagged = queue.request_cancel("acme", "ftjob-1")
    assert (flagged.status, flagged.cancel_requested) == (JobStatus.RUNNING, True)
    assert queue.heartbeat(job, LEASE, {}).cancel_requested
    assert queue.finish(job, JobStatus.CANCELLED, None).status is JobStatus.CANCELLED


def test_a_paused_job_can_be_cancelled(backend, queue):
    enqueue(backend, "ftjob-1")
    assert queue.finish(queue.claim("w", LEASE), JobStatus.PAUSED, None).status is JobStatus.PAUSED
    assert queue.claim("w", LEASE) is None
    assert queue.request_cancel("acme", "ftjob-1").status is JobStatus.CANCELLED


def test_handing_back_a_cancelled_job_ends_it(backend, queue):
    enqueue(backend, "ftjob-1")
    job = queue.claim("w", LEASE)
    queue.request_cancel("acme", "ftjob-1")
    assert queue.finish(job, JobStatus.QUEUED, None).status is JobStatus.CANCELLED


def test_a_cancelled_job_does_not_outlive_its_worker(backend, queue, clock):
    enqueue(backend, "ftjob-1")
    queue.claim("w", LEASE)
    queue.request_cancel("acme", "ftjob-1")
    clock.now += LEASE
    assert queue.claim("w", LEASE) is None
    assert queue.job("acme", "ftjob-1").status is JobStatus.CANCELLED


def test_a_job_may_finish_before_it_hears_of_its_cancelling(backend, queue):
    enqueue(backend, "ftjob-1")
    job = queue.claim("w", LEASE)
    queue.request_cancel("acme", "ftjob-1")
    publish(backend, job=job)
    assert queue.job("acme", "ftjob-1").status is JobStatus.SUCCEEDED


@pytest.mark.parametrize("status", [status for status in JobStatus if status.is_final])
def test_what_is_final_cannot_be_cancelled(backend, queue, status):
    enqueue(backend, "ftjob-1")
    queue.finish(queue.claim("w", LEASE), status, None)
    with pytest.raises(Conflict, match=status):
        queue.request_cancel("acme", "ftjob-1")


def test_an_unknown_and_a_foreign_job_are_told_apart_by_nothing(backend, queue):
    enqueue(backend, "ftjob-1")
    with pytest.raises(JobNotFound) as unknown:
        queue.request_cancel("acme", "ftjob-2")
    with pytest.raises(JobNotFound) as foreign:
        queue.request_cancel("other", "ftjob-1")
    assert unknown.value.message.replace("ftjob-2", "ftjob-1") == foreign.value.message


# looking at jobs


def test_jobs_are_listed_newest_first(backend, queue):
    enqueue(backend, "ftjob-1", "ftjob-2", "ftjob-3")
    enqueue(backend, "ftjob-4", tenant="other")
    assert [job.id for job in queue.jobs("acme", None, 2)] == ["ftjob-3", "ftjob-2"]
    assert [job.id for job in queue.jobs("acme", "ftjob-2", 2)] == ["ftjob-1"]
    with pytest.raises(InvalidRequest, match="after must be the id of a job, got 'ftjob-4'"):
        queue.jobs("acme", "ftjob-4", 2)


def test_job_counts_name_every_status(backend, queue):
    enqueue(backend, "ftjob-1", "ftjob-2", tenant="a")
    enqueue(backend, "ftjob-3", tenant="b")
    queue.claim("w", LEASE)
    assert queue.job_counts() == {**dict.fromkeys(JobStatus, 0), JobStatus.QUEUED: 2, JobStatus.RUNNING: 1}


def test_events_are_numbered_within_their_job(backend, queue, clock):
    enqueue(backend, "ftjob-1", "ftjob-2")
    first, second = queue.claim("w", LEASE), queue.claim("w", LEASE)
    queue.add_event(first, "message", {"message": "started"})
    clock.now += 1
    queue.add_event(second, "message", {})
    queue.add_event(first, "metrics", {"step": 1, "train_loss": 2.5})
    events = queue.events("acme", "ftjob-1", 0, 10)
    assert [(event.sequence, event.kind, event.created_at) for event in events] == [
        (1, "message", 1000.0),
        (2, "metrics", 1001.0),
    ]
    assert events[1].data == {"step": 1, "train_loss": 2.5}
    assert queue.events("acme", "ftjob-1", 1, 10) == events[1:]
    assert queue.events("acme", "ftjob-1", 0, 1) == events[:1]
    assert queue.events("acme", "ftjob-1", 10**12, 1) == []
    assert queue.events("other", "ftjob-1", 0, 10) == []


def test_events_and_beats_do_not_undo_one_another(backend, queue):
    enqueue(backend, "ftjob-1")
    job = queue.claim("w", LEASE)
    queue.add_event(job, "message", {})
    queue.heartbeat(job, LEASE, {"step": 1})
    queue.add_event(job, "message", {})
    assert queue.job("acme", "ftjob-1").progress == {"step": 1}
    assert [event.sequence for event in queue.events("acme", "ftjob-1", 0, 10)] == [1, 2]


# bounds, and many at once


def test_a_quota_bounds_the_jobs_that_have_not_ended(store, backend, queue):
    store.tenants.create("acme")
    store.tenants.set_quotas("acme", {"jobs": 2})
    enqueue(backend, "ftjob-1", "ftjob-2")
    job = queue.claim("w", LEASE)
    with pytest.raises(QuotaExceeded, match="may have 2 jobs; this would make it 3"):
        enqueue(backend, "ftjob-3")
    enqueue(backend, "ftjob-4", tenant="other")
    queue.finish(job, JobStatus.FAILED, None)
    enqueue(backend, "ftjob-3")


def test_threads_claim_every_job_once(backend, queue):
    enqueue(backend, *(f"ftjob-{index}" for index in range(12)))
    claimed: list[str] = []

    def work():
        while (job := queue.claim("w", LEASE)) is not None:
            publish(backend, job=job)
            claimed.append(job.id)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed) == len(set(claimed)) == 12
    versions = Catalog(backend).versions("acme", "support", 0, 100)
    assert [version.version for version in versions] == list(range(1, 13))


# pausing, and going on


def test_a_queued_job_rests_at_once_and_goes_on_in_its_old_place(backend, queue):
    enqueue(backend, "ftjob-1", "ftjob-2")
    paused = queue.request_pause("acme", "ftjob-1")
    assert paused == queue.job("acme", "ftjob-1")
    assert (paused.status, paused.attempt, paused.finished_at) == (JobStatus.PAUSED, 0, None)
    assert queue.claim("w", LEASE).id == "ftjob-2"
    assert queue.claim("w", LEASE) is None
    assert queue.resume("acme", "ftjob-1").status is JobStatus.QUEUED
    enqueue(backend, "ftjob-3")
    assert queue.claim("w", LEASE).id == "ftjob-1"


def test_a_running_job_is_told_to_rest_and_gets_its_attempt_back(backend, queue):
    enqueue(backend, "ftjob-1")
    job = queue.claim("w", LEASE)
    assert queue.request_pause("acme", "ftjob-1").pause_requested
    assert queue.heartbeat(job, LEASE, {}).pause_requested
    paused = queue.finish(job, JobStatus.PAUSED, None)
    assert (paused.status, paused.pause_requested, paused.attempt, paused.lease_until) == ("paused", False, 0, None)
    with pytest.raises(LeaseLost):
        queue.heartbeat(job, LEASE, {})
    queue.resume("acme", "ftjob-1")
    again = queue.claim("w", LEASE)
    assert (again.attempt, again.fence, again.pause_requested) == (1, 2, False)


def test_a_pause_may_be_taken_back_before_it_is_heard(backend, queue):
    enqueue(backend, "ftjob-1")
    job = queue.claim("w", LEASE)
    queue.request_pause("acme", "ftjob-1")
    assert queue.resume("acme", "ftjob-1").status is JobStatus.RUNNING
    assert not queue.heartbeat(job, LEASE, {}).pause_requested


@pytest.mark.parametrize("how", ["handed back", "lapsed"])
def test_a_job_that_was_to_rest_does_so_whatever_becomes_of_its_worker(backend, queue, clock, how):
    enqueue(backend, "ftjob-1")
    job = queue.claim("w", LEASE)
    queue.request_pause("acme", "ftjob-1")
    if how == "lapsed":
        clock.now += LEASE
        assert queue.claim("w2", LEASE) is None
    else:
        queue.finish(job, JobStatus.QUEUED, None)
    assert queue.job("acme", "ftjob-1").status is JobStatus.PAUSED


def test_cancelling_is_more_than_pausing(backend, queue):
    enqueue(backend, "ftjob-1")
    job = queue.claim("w", LEASE)
    queue.request_pause("acme", "ftjob-1")
    queue.request_cancel("acme", "ftjob-1")
    assert queue.finish(job, JobStatus.PAUSED, None).status is JobStatus.CANCELLED


@pytest.mark.parametrize("verb", ["request_pause", "resume"])
def test_what_cannot_rest_or_go_on_says_so(backend, queue, verb):
    enqueue(backend, "ftjob-1", "ftjob-2")
    with pytest.raises(JobNotFound):
        getattr(queue, verb)("other", "ftjob-1")
    queue.request_cancel("acme", "ftjob-1")
    with pytest.raises(Conflict, match="already cancelled"):
        getattr(queue, verb)("acme", "ftjob-1")
    if verb == "resume":
        with pytest.raises(Conflict, match="is queued, not paused"):
            queue.resume("acme", "ftjob-2")
    else:
        queue.request_pause("acme", "ftjob-2")
        with pytest.raises(Conflict, match="already paused"):
            queue.request_pause("acme", "ftjob-2")


def test_pauses_are_audited(store, backend, queue):
    enqueue(backend, "ftjob-1")
    queue.request_pause("acme", "ftjob-1", "key abcdefgh")
    queue.resume("acme", "ftjob-1")
    found = {(entry.by, entry.action, entry.target) for entry in store.audit.entries()}
    assert found == {("key abcdefgh", "job.pause", "ftjob-1"), ("local", "job.resume", "ftjob-1")}


# checkpoints


def lapse(queue, clock, times=1):
    """So many workers die of the job; it is claimed again."""
    for _ in range(times):
        clock.now += LEASE
        job = queue.claim("w", LEASE)
    return job


def test_what_a_job_goes_on_from_comes_with_its_claim(store, backend, queue, clock):
    enqueue(backend, "ftjob-1")
    job = queue.claim("w", LEASE)
    assert queue.checkpoint(job) is None
    for data in (b"first", b"second", b"second"):
        queue.save_checkpoint(job, data)
        kept = queue.job("acme", "ftjob-1")
        assert queue.checkpoint(kept) == data
        assert set(store.blobs.digests()) == {kept.checkpoint}, "the one before it is gone"
    assert queue.checkpoint(lapse(queue, clock)) == b"second"
    assert store.collect() == 0


def test_a_stale_worker_saves_nothing(store, backend, queue, clock):
    enqueue(backend, "ftjob-1")
    stale = queue.claim("w1", LEASE)
    queue.save_checkpoint(stale, b"right")
    fresh = lapse(queue, clock)
    with pytest.raises(LeaseLost):
        queue.save_checkpoint(stale, b"late")
    assert queue.checkpoint(queue.job("acme", "ftjob-1")) == queue.checkpoint(fresh) == b"right"
    assert store.collect() == 1


@pytest.mark.parametrize("end", ["failed", "cancelled", "succeeded", "lost"])
def test_a_job_that_has_ended_leaves_no_checkpoint(store, backend, queue, clock, end):
    enqueue(backend, "ftjob-1")
    job = queue.claim("w", LEASE)
    queue.save_checkpoint(job, b"state")
    if end == "succeeded":
        publish(backend, job=job)
    elif end == "lost":
        clock.now += LEASE
        queue.request_cancel("acme", "ftjob-1")
        assert queue.claim("w", LEASE) is None
    else:
        queue.finish(job, JobStatus(end), None)
    assert queue.job("acme", "ftjob-1").checkpoint is None
    assert store.collect() == 1


def test_two_jobs_may_stand_at_the_same_place(store, backend, queue):
    enqueue(backend, "ftjob-1", "ftjob-2")
    first, second = queue.claim("w", LEASE), queue.claim("w", LEASE)
    for job in (first, second):
        queue.save_checkpoint(job, b"same")
    queue.save_checkpoint(first, b"further")
    assert queue.checkpoint(queue.job("acme", "ftjob-2")) == b"same"


def test_only_attempts_that_got_no_further_count(backend, queue, clock):
    enqueue(backend, "ftjob-1")
    job = queue.claim("w", LEASE)
    for number in range(3):
        job = lapse(queue, clock, MAX_ATTEMPTS - 1)
        assert (job.lapses, job.attempt) == (MAX_ATTEMPTS - 1, 1 + (number + 1) * (MAX_ATTEMPTS - 1))
        queue.save_checkpoint(job, b"step %d" % number)
    assert lapse(queue, clock, MAX_ATTEMPTS) is None
    failed = queue.job("acme", "ftjob-1")
    assert (failed.status, failed.error) == (JobStatus.FAILED, LOST)


def test_a_checkpoint_is_counted_whole_and_damage_is_found(store, backend, queue):
    job = queue.submit("acme", "support", [{"prompt": "a", "completion": "b"}], {})
    queue.save_checkpoint(queue.claim("w", LEASE), b"state")
    assert checkup.examine(store, lambda done, total: None).faults == []
    damage(store, queue.job("acme", job.id).checkpoint, b"other")
    (fault,) = checkup.examine(store, lambda done, total: None).faults
    assert fault.startswith(f"{job.id}, its checkpoint: ")
    with pytest.raises(StoreCorrupt):
        queue.checkpoint(queue.job("acme", job.id))


def test_an_erased_tenant_leaves_no_checkpoint(store, backend, queue):
    queue.submit("acme", "support", [{"prompt": "a", "completion": "b"}], {})
    job = queue.claim("w", LEASE)
    queue.save_checkpoint(job, b"state")
    store.erase_tenant("acme")
    assert list(store.blobs.digests()) == []
    with pytest.raises((LeaseLost, StoreUnavailable)):
        queue.save_checkpoint(job, b"more")
    store.collect()
    assert list(store.blobs.digests()) == []
