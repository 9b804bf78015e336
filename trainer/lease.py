"""Holding on to a claimed job: a thread that says every few seconds that its worker is alive."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any

from prefix_store.errors import LeaseLost, StoreUnavailable
from prefix_store.jobs import JobStatus, TrainingJob
from prefix_store.store import Store


class Cancelled(Exception):
    """The job's owner no longer wants it."""


class Lease:
    """A claimed job while this worker owns it: `with Lease(...) as lease`, and `lease.check()` before every step.

    A store that cannot be reached for a while is no reason to stop: the lease counts on the store's side, and whoever
    was too late is told so by the next write.
    """

    def __init__(self, store: Store, job: TrainingJob, seconds: float, every: float) -> None:
        self.job = job
        self._jobs = store.jobs
        self._seconds, self._every = seconds, every
        self.progress: dict[str, Any] = job.progress  # what the next heartbeat records
        self.handed_back = False
        self._cancelled, self._lost = False, False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"lease-{job.id}", daemon=True)

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def check(self) -> None:
        """Raises LeaseLost or Cancelled unless the work should go on."""
        if self._lost or self.handed_back:
            raise LeaseLost(f"job {self.job.id} no longer belongs to this worker")
        if self._cancelled:
            raise Cancelled

    def beat(self) -> None:
        """One heartbeat now, without waiting for the thread's next."""
        try:
            answer = self._jobs.heartbeat(self.job, self._seconds, self.progress)
        except LeaseLost:
            self._lost = True
        except StoreUnavailable:
            return
        else:
            self._cancelled |= answer.cancel_requested

    def hand_back(self) -> None:
        """Puts the job back into the queue at once, from any thread; from now on it is no longer this worker's."""
        self.handed_back = True
        with suppress(LeaseLost, StoreUnavailable):
            self._jobs.finish(self.job, JobStatus.QUEUED, None)

    def _keep(self) -> None:
        while not self._lost and not self._closed.wait(self._every):
            self.beat()
