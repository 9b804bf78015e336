"""Claims jobs and sees each to its end. The store is its only contact with the rest of the world."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Mapping

import torch

from prefix_store.errors import AntefixError, LeaseLost, StoreUnavailable
from prefix_store.jobs import JobError, JobStatus
from prefix_store.model import apply
from prefix_store.model.frozen import FrozenModel
from prefix_store.store import Store
from trainer.job_run import JobRun
from trainer.lease import Cancelled, Lease
from trainer.methods import METHODS
from trainer.methods.base import NewMethod

LOST = "lost"  # how a job ends for this worker when another owns it or the store cannot be told
FAILURES: dict[type[Exception], str] = {
    FloatingPointError: "training_diverged",
    torch.OutOfMemoryError: "out_of_memory",
    MemoryError: "out_of_memory",
}


def say(line: str) -> None:
    """One line for the operator."""
    print(f"antefix worker: {line}", flush=True)


class Worker:
    """Trains prefixes of one frozen model, a job at a time. Nothing that a job does ends the worker.

    `say` gets lines for people, `on_step` hears of every step taken, `on_end` how each job ended: a status or `lost`.
    """

    def __init__(
        self,
        store: Store,
        frozen: FrozenModel,
        name: str,
        *,
        methods: Mapping[str, NewMethod] = METHODS,
        lease_seconds: float = 60.0,
        heartbeat_seconds: float = 10.0,
        say: Callable[[str], None] = say,
        on_step: Callable[[], None] = lambda: None,
        on_end: Callable[[str], None] = lambda status: None,
    ) -> None:
        self.name = name
        self._store = store
        self._frozen = apply.attach(frozen)
        self._methods = methods
        self._lease_seconds, self._heartbeat_seconds = lease_seconds, heartbeat_seconds
        self._say, self._on_step, self._on_end = say, on_step, on_end
        self._stopping = threading.Event()
        self._lease: Lease | None = None

    def run(self, poll_seconds: float = 0.5) -> None:
        """Works until stopped; a store that cannot be reached is asked again."""
        while not self._stopping.is_set():
            try:
                busy = self.run_next()
            except StoreUnavailable as error:
                self._say(f"waiting for the store: {error.message}")
                busy = False
            if not busy:
                self._stopping.wait(poll_seconds)

    def run_until_empty(self) -> int:
        """Works until nothing is left to claim and returns how many jobs were run."""
        count = 0
        while not self._stopping.is_set() and self.run_next():
            count += 1
        return count

    def run_next(self) -> bool:
        """Sees one job to its end, whatever end; False if there was none."""
        job = self._store.jobs.claim(self.name, self._lease_seconds)
        if job is None:
            return False
        with Lease(self._store, job, self._lease_seconds, self._heartbeat_seconds) as lease:
            self._lease = lease
            if self._stopping.is_set():  # it came between the claim and the line above
                lease.hand_back()
            self._on_end(self._run(lease))
            self._lease = None
        return True

    def stop(self) -> None:
        """Ends `run` soon, from any thread; a running job is back in the queue when this returns."""
        self._stopping.set()
        lease = self._lease
        if lease is not None:
            lease.hand_back()

    def _run(self, lease: Lease) -> str:
        job = lease.job
        self._say(f"{job.id}: {job.tenant}/{job.name}, attempt {job.attempt}")
        try:
            version = JobRun(self._store, self._frozen, self._methods, lease, self._say, self._on_step).publish()
        except Cancelled:
            return self._end(lease, JobStatus.CANCELLED)
        except (LeaseLost, StoreUnavailable) as error:
            self._say(f"{job.id}: " + ("handed back" if lease.handed_back else f"nothing published: {error.message}"))
            return JobStatus.QUEUED if lease.handed_back else LOST
        except Exception as error:
            return self._end(lease, JobStatus.FAILED, explain(error))
        self._say(f"{job.id}: published {version.ref}")
        return JobStatus.SUCCEEDED

    def _end(self, lease: Lease, status: JobStatus, error: JobError | None = None) -> str:
        try:
            self._store.jobs.finish(lease.job, status, error)
        except (LeaseLost, StoreUnavailable):
            return LOST
        self._say(f"{lease.job.id}: {status}" + (f" ({error.code}): {error.message}" if error is not None else ""))
        return status


def explain(error: Exception) -> JobError:
    """A failure as its job records it; what nobody foresaw is also printed in full."""
    if isinstance(error, AntefixError):
        return JobError(error.code, error.message)
    for kind, code in FAILURES.items():
        if isinstance(error, kind):
            return JobError(code, str(error)[:500] or code)
    traceback.print_exception(error)
    return JobError("training_failed", f"{type(error).__name__}: {error}"[:500])
