"""The leased queue: who may work on which job, and how jobs end. Times are the store's own clock, in seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from prefix_store import audit, job_records, layout
from prefix_store.backends.base import PAGE, Backend, Transaction, View
from prefix_store.errors import Conflict, JobNotFound
from prefix_store.job_needs import Needs, Takes, whatever
from prefix_store.job_records import JobRecord
from prefix_store.jobs import MAX_ATTEMPTS, TRANSITIONS, Heartbeat, JobError, JobStatus, TrainingJob

QUEUED = "queued/"
LOST = JobError("worker_lost", f"the worker stopped answering in {MAX_ATTEMPTS} attempts, and the job got no further")
# A job that waits or whose lease has lapsed: how busy its tenant is, since when that waits, the job's age, its id.
_Candidate = tuple[int, float, float, str]


class JobQueue:
    """Hands jobs to workers. A write under an older fence than the store's is refused with LeaseLost.

    `lapsed` counts the leases that this process's claims found to have run out, and took over or ended. `passed_by`:
    how many waiting jobs the last claim saw that were for other workers; all that there are, if it found none to take.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.lapsed, self.passed_by = 0, 0

    def claim(self, worker: str, lease_seconds: float, takes: Takes = whatever) -> TrainingJob | None:
        """Takes the next job that the worker `takes`: queued, or running with a lapsed lease.

        That of the least busy tenant; of several such, of the one that waits longest, by its oldest job or since its
        last turn; of a tenant's jobs the oldest. Raises attempt and fence. A job whose lease has lapsed is not taken
        but cancelled or paused if that was requested, or failed with code `worker_lost` if so many of its attempts
        ended so without getting it further; this whoever it is for.
        """
        while True:
            # outside the transaction, which then holds no more records than there are tenants
            with self._backend.view() as view:
                waiting = _waiting(view, takes)
            if waiting.old:
                self._backend.write(partial(_renew, waiting.old))
            found, lapsed, is_known = self._backend.write(partial(self._claim, worker, lease_seconds, takes, waiting))
            self.lapsed += lapsed
            if is_known:
                self.passed_by = waiting.passed_by
                return found

    def _claim(
        self, worker: str, lease_seconds: float, takes: Takes, waiting: _Waiting, transaction: Transaction
    ) -> tuple[TrainingJob | None, int, bool]:
        """A job, how many leases had run out, and False where others were quicker and more may wait."""
        entries = transaction.get_many([QUEUED + key for key in waiting.first])
        found = [(_tenant(key), entry) for key, entry in zip(waiting.first, entries, strict=True)]
        candidates, ended = _candidates(transaction, [(one, entry) for one, entry in found if entry is not None], takes)
        if not candidates:
            return None, ended, None not in entries
        record = job_records.find(transaction, min(candidates)[-1])
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
        return claimed.job, ended + has_lapsed, True

    def overdue(self) -> int:
        """How many jobs run whose lease has run out, and that no other worker has claimed yet."""
        with self._backend.view() as view:
            now = view.now
            return sum(entry["until"] <= now for _, entry in view.scan("running/"))

    def waiting(self, takes: Takes = whatever) -> set[str]:
        """The tenants that have a job waiting which the worker `takes`."""
        with self._backend.view() as view:
            return {_tenant(key) for key in _waiting(view, takes).first}

    def busy(self) -> Counter[str]:
        """How many jobs of each tenant run, of those whose lease holds."""
        with self._backend.view() as view:
            return _busy(view.scan("running/"), view.now)

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

        return self._end(job, status, error, had_turn=status is not JobStatus.QUEUED)

    def make_way(self, job: TrainingJob) -> TrainingJob:
        """Hands a running job back, as `finish` does, whose tenant has had its turn: others that wait come first.

        The job keeps its place among its own tenant's. Raises LeaseLost.
        """
        return self._end(job, JobStatus.QUEUED, None, had_turn=True)

    def _end(self, job: TrainingJob, status: JobStatus, error: JobError | None, *, had_turn: bool) -> TrainingJob:
        def work(transaction: Transaction) -> TrainingJob:
            record = job_records.owned(transaction, job)
            ended = status if status.is_final else _wanted(record.job) or status
            return job_records.release(transaction, record, ended, error, had_turn=had_turn).job

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


def _candidates(
    transaction: Transaction, waiting: Iterable[tuple[str, dict[str, Any]]], takes: Takes
) -> tuple[list[_Candidate], int]:
    """One of each tenant that has a job waiting, and all whose lease has lapsed; ends those that are past hope.

    With them comes how many were ended.
    """
    now, ended = transaction.now, 0
    running = transaction.scan("running/")
    found = list(waiting)
    for _, entry in running:
        if entry["until"] <= now:
            record = job_records.find(transaction, entry["job"])
            assert record is not None
            if not _is_hopeful(transaction, record):
                ended += 1
            elif takes(Needs.of(record.job.spec)):
                found.append((record.job.tenant, entry))
    busy = _busy(running, now)
    turns = transaction.get_many([layout.turn(tenant) for tenant, _ in found])
    candidates = [
        (busy[tenant], max(entry["at"], turn["at"] if turn is not None else 0.0), entry["at"], entry["job"])
        for (tenant, entry), turn in zip(found, turns, strict=True)
    ]
    return candidates, ended


def _busy(running: Iterable[tuple[str, Any]], now: float) -> Counter[str]:
    return Counter(_tenant(key) for key, entry in running if entry["until"] > now)


@dataclass
class _Waiting:
    """Of each tenant the key of the first job that a worker takes, and how many it does not take stand before these.

    `old`: jobs whose entries an older version wrote, without what they need.
    """

    first: list[str] = field(default_factory=list)
    passed_by: int = 0
    old: list[str] = field(default_factory=list)


def _waiting(view: View, takes: Takes) -> _Waiting:
    """Reads one entry a tenant where the first is taken, else a page at a time."""
    found = _Waiting()
    after, limit, done = "", 1, ""  # `done`: the last tenant of whom a job was found
    while page := view.scan(QUEUED, after=after, limit=limit):
        for key, entry in page:
            if _tenant(key) == done:
                continue
            needs = Needs.from_json(entry)
            if needs is None:
                record = job_records.find(view, entry["job"])
                if record is None:  # erased since the page was read, for a view is of no single moment
                    continue
                needs = Needs.of(record.job.spec)
                found.old.append(record.job.id)
            if takes(needs):
                found.first.append(key)
                done = _tenant(key)
            else:
                found.passed_by += 1
        after, limit = page[-1][0], PAGE
        if _tenant(after) == done:
            after, limit = done + "/~", 1  # behind every number
    return found


def _renew(job_ids: Iterable[str], transaction: Transaction) -> None:
    """Writes the entries of jobs as this version does."""
    for job_id in job_ids:
        if (record := job_records.find(transaction, job_id)) is not None and record.place is not None:
            transaction.put(record.place, record.entry)


def _tenant(key: str) -> str:
    """Of an entry, by its key in its folder."""
    return key.partition("/")[0]


def _is_hopeful(transaction: Transaction, record: JobRecord) -> bool:
    if (wanted := _wanted(record.job)) is not None:
        job_records.release(transaction, record, wanted)
    elif record.job.lapses + 1 >= MAX_ATTEMPTS:
        job_records.release(transaction, record, JobStatus.FAILED, LOST)
    else:
        return True
    return False
