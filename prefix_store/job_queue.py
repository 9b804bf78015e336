"""The leased queue: who may work on which job, and how jobs end. Times are the store's own clock, in seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from prefix_store import audit, job_records
from prefix_store.backends.base import Backend, Transaction
from prefix_store.errors import Conflict, JobNotFound
from prefix_store.job_records import JobRecord
from prefix_store.jobs import MAX_ATTEMPTS, TRANSITIONS, Heartbeat, JobError, JobStatus, TrainingJob

LOST = JobError("worker_lost", f"the worker stopped answering in each of {MAX_ATTEMPTS} attempts")
# A job that waits or whose lease has lapsed: how busy its tenant is, then its age, then its id.
_Candidate = tuple[int, float, str]


class JobQueue:
    """Hands jobs to workers. A write under an older fence than the store's is refused with LeaseLost."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def claim(self, worker: str, lease_seconds: float) -> TrainingJob | None:
        """Takes the next job: queued, or running with a lapsed lease; least busy tenant first, then age.

        Raises attempt and fence. A job whose lease has lapsed is not taken but cancelled if that was requested, or
        failed with code `worker_lost` if its attempts are used up.
        """

        def work(transaction: Transaction) -> TrainingJob | None:
            candidates = _candidates(transaction)
            if not candidates:
                return None
            record = job_records.find(transaction, min(candidates)[2])
            assert record is not None
            job, now = record.job, transaction.now
            return job_records.change(
                transaction,
                record,
                status=JobStatus.RUNNING,
                attempt=job.attempt + 1,
                fence=job.fence + 1,
                worker=worker,
                lease_until=now + lease_seconds,
                started_at=job.started_at if job.started_at is not None else now,
            ).job

        return self._backend.write(work)

    def heartbeat(self, job: TrainingJob, lease_seconds: float, progress: dict[str, Any]) -> Heartbeat:
        """Extends the lease and records progress. Raises LeaseLost."""

        def work(transaction: Transaction) -> Heartbeat:
            record = job_records.owned(transaction, job)
            until = transaction.now + lease_seconds
            job_records.change(transaction, record, lease_until=until, progress=progress)
            return Heartbeat(record.job.cancel_requested)

        return self._backend.write(work)

    def finish(self, job: TrainingJob, status: JobStatus, error: JobError | None) -> TrainingJob:
        """Ends a running job, or hands it back with status queued. Raises LeaseLost, Conflict for an illegal status.

        A job that is handed back gets its attempt back; if its cancelling was requested, it is cancelled instead.
        """
        if status not in TRANSITIONS[JobStatus.RUNNING]:
            raise Conflict(f"a running job cannot become {status}")

        def work(transaction: Transaction) -> TrainingJob:
            record = job_records.owned(transaction, job)
            hand_back = not status.is_final
            ended = JobStatus.CANCELLED if hand_back and record.job.cancel_requested else status
            return job_records.release(transaction, record, ended, error).job

        return self._backend.write(work)

    def request_cancel(self, tenant: str, job_id: str, by: str = audit.LOCAL) -> TrainingJob:
        """A queued job is cancelled at once, a running one is flagged. Raises JobNotFound, Conflict when final."""

        def work(transaction: Transaction) -> TrainingJob:
            record = job_records.find(transaction, job_id, tenant)
            if record is None:
                raise JobNotFound(f"no job {job_id[:80]!r}")
            if record.job.status.is_final:
                raise Conflict(f"job {job_id} is already {record.job.status}")
            audit.record(transaction, by, tenant, "job.cancel", job_id)
            if record.job.status is JobStatus.RUNNING:
                return job_records.change(transaction, record, cancel_requested=True).job
            return job_records.release(transaction, record, JobStatus.CANCELLED, cancel_requested=True).job

        return self._backend.write(work)

    def add_event(self, job: TrainingJob, kind: str, data: dict[str, Any]) -> None:
        """Appends to the job's history. Raises LeaseLost."""

        def work(transaction: Transaction) -> None:
            record = job_records.owned(transaction, job)
            job_records.add_event(transaction, record, kind, data)

        self._backend.write(work)


def _candidates(transaction: Transaction) -> list[_Candidate]:
    """One of each tenant that has a job waiting, and all whose lease has lapsed; ends those that are past hope."""
    now = transaction.now
    running = transaction.scan("running/")
    busy = Counter(key.partition("/")[0] for key, entry in running if entry["until"] > now)
    candidates = [(busy[key.partition("/")[0]], entry["at"], entry["job"]) for key, entry in _oldest(transaction)]
    for _, entry in running:
        if entry["until"] <= now:
            record = job_records.find(transaction, entry["job"])
            assert record is not None
            if _is_hopeful(transaction, record):
                candidates.append((busy[record.job.tenant], entry["at"], entry["job"]))
    return candidates


def _oldest(transaction: Transaction) -> Iterator[tuple[str, Any]]:
    """The first in each tenant's queue: `TENANT/NUMBER` and its entry."""
    after = ""
    while page := transaction.scan("queued/", after=after, limit=1):
        yield page[0]
        after = page[0][0].partition("/")[0] + "/~"  # behind every number


def _is_hopeful(transaction: Transaction, record: JobRecord) -> bool:
    if record.job.cancel_requested:
        job_records.release(transaction, record, JobStatus.CANCELLED)
    elif record.job.attempt >= MAX_ATTEMPTS:
        job_records.release(transaction, record, JobStatus.FAILED, LOST)
    else:
        return True
    return False
