"""The claim to a job, and the thread that says every few seconds, for all jobs of a worker, that it is alive."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any

from prefix_store.errors import LeaseLost, StoreUnavailable
from prefix_store.jobs import JobError, JobStatus, TrainingJob
from prefix_store.store import Store

LOST = "lost"  # how a job ends for this worker when another owns it or the store cannot be told


class Cancelled(Exception):
    """The job's owner no longer wants it."""


class Paused(Exception):
    """The job's owner wants it to rest."""


class Lease:
    """A claimed job while this worker owns it; `check` before every step.

    A store that cannot be reached for a while is no reason to stop: the lease counts on the store's side, and whoever
    was too late is told so by the next write.
    """

    def __init__(self, store: Store, job: TrainingJob, seconds: float) -> None:
        self.job = job
        self._jobs, self._seconds = store.jobs, seconds
        self.progress: dict[str, Any] = job.progress  # what the next heartbeat records
        self.handed_back = False
        self._cancelled, self._paused, self._lost = False, False, False

    def renew(self, job: TrainingJob) -> None:
        """It had lapsed, and this very worker was the one to claim the job again."""
        self.job, self._lost = job, False

    def check(self) -> None:
        """Raises LeaseLost, Cancelled or Paused unless the work should go on."""
        if self._lost or self.handed_back:
            raise LeaseLost(f"job {self.job.id} no longer belongs to this worker")
        if self._cancelled:
            raise Cancelled
        if self._paused:
            raise Paused

    def beat(self) -> None:
        """One heartbeat now."""
        if self._lost or self.handed_back:
            return
        try:
            answer = self._jobs.heartbeat(self.job, self._seconds, self.progress)
        except LeaseLost:
            self._lost = True
        except StoreUnavailable:
            return
        else:
            self._cancelled, self._paused = answer.cancel_requested, answer.pause_requested

    def finish(self, status: JobStatus, error: JobError | None = None) -> str:
        """Tells the store how the job ended: the status that it has then, or `lost`."""
        try:
            return self._jobs.finish(self.job, status, error).status
        except (LeaseLost, StoreUnavailable):
            return LOST

    def hand_back(self) -> None:
        """Puts the job back into the queue at once, from any thread; from now on it is no longer this worker's."""
        self.handed_back = True
        with suppress(LeaseLost, StoreUnavailable):
            self._jobs.finish(self.job, JobStatus.QUEUED, None)

    def make_way(self) -> None:
        """The same, behind the other tenants that wait."""
        self.handed_back = True
        with suppress(LeaseLost, StoreUnavailable):
            self._jobs.make_way(self.job)


class Leases:
    """All that a worker holds: `with Leases(...) as leases` beats for each, every so many seconds."""

    def __init__(self, store: Store, seconds: float, every: float) -> None:
        self._store, self._seconds, self._every = store, seconds, every
        self._held: tuple[Lease, ...] = ()  # never changed in place: two threads read it
        self._closed = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._keep, name="leases", daemon=True)

    def __enter__(self) -> Leases:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def check(self) -> None:
        """Raises what has ended the heartbeats, if anything has: without them no job may go on."""
        if self._failure is not None:
            raise self._failure

    def take(self, job: TrainingJob) -> Lease:
        """From now on its lease is kept."""
        lease = Lease(self._store, job, self._seconds)
        self._held += (lease,)
        return lease

    def drop(self, lease: Lease) -> None:
        """From now on it is not."""
        self._held = tuple(held for held in self._held if held is not lease)

    def hand_back(self) -> None:
        """Every job, at once, from any thread."""
        for lease in self._held:
            lease.hand_back()

    def _keep(self) -> None:
        try:
            while not self._closed.wait(self._every):
                for lease in self._held:
                    lease.beat()
        except Exception as error:
            self._failure = error
