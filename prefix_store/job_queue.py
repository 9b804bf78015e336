"""The leased queue: who may work on which job, and how jobs end. Times are the store's own clock, in seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from prefix_store import audit, job_records
from prefix_store.backends.base import Backend, Transaction, View
from prefix_store.errors import Conflict, JobNotFound
from prefix_store.job_records import JobRecord
from prefix_store.jobs import MAX_ATTEMPTS, TRANSITIONS, Heartbeat, JobError, JobStatus, TrainingJob

LOST = JobError("worker_lost", f"the worker stopped answering in {MAX_ATTEMPTS} attempts, and the job got no further")
# A job that waits or whose lease has lapsed: how busy its tenant is, then its age, then its id.
_Candidate = tuple[int, float, str]


class JobQueue:
    """Hands jobs to workers. A write under an older fence than the store's is refused with LeaseLost.

    `lapsed` counts the leases that this process's claims found to have run out, and took over or ended.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.lapsed = 0

    def claim(self, worker: str, lease_seconds: float) -> TrainingJob | None:
        """Takes the next job: queued, or running with a lapsed lease; least busy tenant first, then age.

        Raises attempt and fence. A job whose lease has lapsed is not taken but cancelled or paused if that was
        requested, or failed with code `worker_lost` if so many of its attempts ended so without getting it further.
        """

        def work(transaction: Transaction) -> tuple[TrainingJob | None, int]:
            candidates, ended = _candidates(transaction)
            if not candidates:
                return None, ended
            record = job_records.find(transaction, min(candidates)[2])
            assert record is not None
            job, now = record.job, transaction.now
            has_lapsed = job.status is JobStatus.RUNNING
            claimed = job_records.change(
                transaction,
                record,
                status=JobStatus.RUNNING,
                attempt=job.attempt + 1,
                fence=job.fence + 1,
                lapses=job.lapses + has_lapsed,
                worker=worker,
                lease_until=now + lease_seconds,
                heartbeat_at=now,
                started_at=job.started_at if job.started_at is not None else now,
            )
            return claimed.job, ended + has_lapsed

        found, lapsed = self._backend.write(work)
        self.lapsed += lapsed
        return found

    def overdue(self) -> int:
        """How many jobs run whose lease has run out, and that no other worker has claimed yet."""
        with self._backend.view() as view:
            now = view.now
            return sum(entry["until"] <= now for _, entry in view.scan("running/"))

    def waiting(self) -> set[str]:
        """The tenants that have a job waiting."""
        with self._backend.view() as view:
            return {key.partition("/")[0] for key, _ in _oldest(view)}

    def heartbeat(self, job: TrainingJob, lease_seconds: float, progress: dict[str, Any]) -> Heartbeat:
        """Extends the lease and records progress. Raises LeaseLost."""

        def work(transaction: Transaction) -> Heartbeat:
            record = job_records.owned(transaction, job)
            now = transaction.now
            job_records.change(
                transaction, record, lease_until=now + lease_seconds, heartbeat_at=now, progress=progress
            )
            return Heartbeat(record.job.cancel_requested, record.job.pause_requested)

        return self._backend.write(work)

    def finish(self, job: TrainingJob, status: JobStatus, error: JobError | None) -> TrainingJob:
        """Ends a running job, or hands it back with status queued or paused.

        A job that is handed back gets its attempt back; if its cancelling was requested, it is cancelled instead, and
        paused if that was. Raises LeaseLost, Conflict for an illegal status.
        """
        if status not in TRANSITIONS[JobStatus.RUNNING]:
            raise Conflict(f"a running job cannot become {status}")

        def work(transaction: Transaction) -> TrainingJob:
            record = job_records.owned(transaction, job)
            ended = status if status.is_final else _wanted(record.job) or status
            return job_records.release(transaction, record, ended, error).job

        return self._backend.write(work)

    def request_cancel(self, tenant: str, job_id: str, by: str = audit.LOCAL) -> TrainingJob:
        """A queued job is cancelled at once, a running one is flagged. Raises JobNotFound, Conflict when final."""

        def work(transaction: Transaction) -> TrainingJob:
            record = _unfinished(transaction, tenant, job_id)
            audit.record(transaction, by, tenant, "job.cancel", job_id)
            if record.job.status is JobStatus.RUNNING:
                return job_records.change(transaction, record, cancel_requested=True).job
            return job_records.release(transaction, record, JobStatus.CANCELLED, cancel_requested=True).job

        return self._backend.write(work)

    def request_pause(self, tenant: str, job_id: str, by: str = audit.LOCAL) -> TrainingJob:
        """A queued job rests at once, a running one is flagged. Raises JobNotFound, Conflict when final or paused."""

        def work(transaction: Transaction) -> TrainingJob:
            record = _unfinished(transaction, tenant, job_id)
            if record.job.status is JobStatus.PAUSED:
                raise Conflict(f"job {job_id} is already paused")
            audit.record(transaction, by, tenant, "job.pause", job_id)
            if record.job.status is JobStatus.RUNNING:
                return job_records.change(transaction, record, pause_requested=True).job
            return job_records.change(transaction, record, status=JobStatus.PAUSED).job

        return self._backend.write(work)

    def resume(self, tenant: str, job_id: str, by: str = audit.LOCAL) -> TrainingJob:
        """A paused job waits again, in its old place; of a running one that was to be paused the flag is taken away.

        Raises JobNotFound, Conflict for any other.
        """

        def work(transaction: Transaction) -> TrainingJob:
            record = _unfinished(transaction, tenant, job_id)
            status = record.job.status
            if status is not JobStatus.PAUSED and not record.job.pause_requested:
                raise Conflict(f"job {job_id} is {status}, not paused")
            audit.record(transaction, by, tenant, "job.resume", job_id)
            again = JobStatus.QUEUED if status is JobStatus.PAUSED else status
            return job_records.change(transaction, record, status=again, pause_requested=False).job

        return self._backend.write(work)

    def add_event(self, job: TrainingJob, kind: str, data: dict[str, Any]) -> None:
        """Appends to the job's history. Raises LeaseLost."""

        def work(transaction: Transaction) -> None:
            record = job_records.owned(transaction, job)
            job_records.add_event(transaction, record, kind, data)

        self._backend.write(work)


def _unfinished(transaction: Transaction, tenant: str, job_id: str) -> JobRecord:
    record = job_records.find(transaction, job_id, tenant)
    if record is None:
        raise JobNotFound(f"no job {job_id[:80]!r}")
    if record.job.status.is_final:
        raise Conflict(f"job {job_id} is already {record.job.status}")
    return record


def _wanted(job: TrainingJob) -> JobStatus | None:
    """What its owner has asked a running job to become."""
    if job.cancel_requested:
        return JobStatus.CANCELLED
    return JobStatus.PAUSED if job.pause_requested else None


def _candidates(transaction: Transaction) -> tuple[list[_Candidate], int]:
    """One of each tenant that has a job waiting, and all whose lease has lapsed; ends those that are past hope.

    With them comes how many were ended.
    """
    now, ended = transaction.now, 0
    running = transaction.scan("running/")
    busy = Counter(key.partition("/")[0] for key, entry in running if entry["until"] > now)
    candidates = [(busy[key.partition("/")[0]], entry["at"], entry["job"]) for key, entry in _oldest(transaction)]
    for _, entry in running:
        if entry["until"] <= now:
            record = job_records.find(transaction, entry["job"])
            assert record is not None
            if _is_hopeful(transaction, record):
                candidates.append((busy[record.job.tenant], entry["at"], entry["job"]))
            else:
                ended += 1
    return candidates, ended


def _oldest(view: View) -> Iterator[tuple[str, Any]]:
    """The first in each tenant's queue: `TENANT/NUMBER` and its entry."""
    after = ""
    while page := view.scan("queued/", after=after, limit=1):
        yield page[0]
        after = page[0][0].partition("/")[0] + "/~"  # behind every number


def _is_hopeful(transaction: Transaction, record: JobRecord) -> bool:
    if (wanted := _wanted(record.job)) is not None:
        job_records.release(transaction, record, wanted)
    elif record.job.lapses + 1 >= MAX_ATTEMPTS:
        job_records.release(transaction, record, JobStatus.FAILED, LOST)
    else:
        return True
    return False
