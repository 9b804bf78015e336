"""A job's records: its own, its place among those that wait or run, and its tenant's counts, always in step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from prefix_store import layout, usage
from prefix_store.backends.base import Transaction, View
from prefix_store.errors import Conflict, LeaseLost
from prefix_store.job_needs import Needs
from prefix_store.jobs import JobError, JobEvent, JobStatus, TrainingJob

FOLDERS = {JobStatus.QUEUED: "queued", JobStatus.RUNNING: "running"}


@dataclass(frozen=True)
class JobRecord:
    """A job, its number among its tenant's, and how many lines its history has."""

    job: TrainingJob
    number: int
    events: int = 0

    @property
    def place(self) -> str | None:
        """The key of its entry among those that wait or run; None when it does neither."""
        folder = FOLDERS.get(self.job.status)
        return layout.jobs(folder, self.job.tenant, self.number) if folder is not None else None

    @property
    def entry(self) -> dict[str, Any]:
        """What stands there: all that a claim asks of jobs that it does not take."""
        job = self.job
        return {"job": job.id, "at": job.created_at, "until": job.lease_until, **Needs.of(job.spec).to_json()}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, as the store keeps it."""
        return {**self.job.to_json(), "number": self.number, "events": self.events}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> JobRecord:
        """Reads `to_json`'s object."""
        return cls(TrainingJob.from_json(data), data["number"], data["events"])


def find(view: View, job_id: str, tenant: str | None = None) -> JobRecord | None:
    """The job with this id, of this tenant if one is given; None if there is none."""
    data = view.get(layout.job(job_id))
    return JobRecord.from_json(data) if data is not None and tenant in (None, data["tenant"]) else None


def add(transaction: Transaction, job: TrainingJob) -> None:
    """Writes a new job, which is queued. Raises QuotaExceeded, Conflict if its id is taken."""
    if find(transaction, job.id) is not None:
        raise Conflict(f"there is a job {job.id} already")
    record = JobRecord(job, usage.add_job(transaction, job.tenant))
    transaction.put(layout.jobs("jobs", job.tenant, record.number), job.id)
    transaction.put(layout.blob_of_job(job.spec.data_digest, job.id), {})
    _write(transaction, record)


def change(transaction: Transaction, record: JobRecord, **fields: Any) -> JobRecord:
    """Writes a job with these fields changed, and returns it."""
    changed = dataclasses.replace(record, job=dataclasses.replace(record.job, **fields))
    if changed.job.status is not record.job.status:
        usage.move_job(transaction, record.job.tenant, record.job.status, changed.job.status)
    if record.place not in (None, changed.place):
        transaction.delete(record.place)
    old, new = record.job.checkpoint, changed.job.checkpoint
    if old not in (None, new):
        transaction.delete(layout.blob_of_checkpoint(old, record.job.id))
    if new not in (None, old):
        transaction.put(layout.blob_of_checkpoint(new, record.job.id), {"tenant": record.job.tenant})
    _write(transaction, changed)
    return changed


def release(
    transaction: Transaction,
    record: JobRecord,
    status: JobStatus,
    error: JobError | None = None,
    *,
    had_turn: bool = True,
    **fields: Any,
) -> JobRecord:
    """Ends a job, or puts it back among those that wait or rest, and returns it.

    Of one that ran, its tenant has then had its turn, unless `had_turn` says otherwise.
    """
    if had_turn and record.job.status is JobStatus.RUNNING:
        transaction.put(layout.turn(record.job.tenant), {"at": transaction.now})
    if status.is_final:
        fields |= {"finished_at": transaction.now, "checkpoint": None}
    else:
        # a worker that stops in good order has not failed; only attempts that ended badly count
        fields |= {"attempt": record.job.attempt - 1}
    return change(transaction, record, status=status, error=error, lease_until=None, pause_requested=False, **fields)


def owned(view: View, job: TrainingJob) -> JobRecord:
    """The job as it is now. Raises LeaseLost unless it runs under `job.fence`."""
    record = find(view, job.id)
    if record is None or record.job.fence != job.fence or record.job.status is not JobStatus.RUNNING:
        raise LeaseLost(f"job {job.id} no longer belongs to this worker")
    return record


def _write(transaction: Transaction, record: JobRecord) -> None:
    job = record.job
    transaction.put(layout.job(job.id), record.to_json())
    if record.place is not None:
        transaction.put(record.place, record.entry)


def add_event(transaction: Transaction, record: JobRecord, kind: str, data: dict[str, Any]) -> None:
    """Appends to the job's history."""
    changed = dataclasses.replace(record, events=record.events + 1)
    event = JobEvent(record.job.id, changed.events, transaction.now, kind, data)
    transaction.put(layout.event(event.job_id, event.sequence), dataclasses.asdict(event))
    _write(transaction, changed)
