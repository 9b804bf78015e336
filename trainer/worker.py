"""Claims jobs and sees each to its end, many at a time. The store is its only contact with the rest of the world."""

from __future__ import annotations

import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial

import torch

from prefix_store.errors import AntefixError, LeaseLost, StoreUnavailable
from prefix_store.jobs import JobError, JobStatus, TrainingJob
from prefix_store.model.frozen import FrozenModel
from prefix_store.store import Store
from trainer import memory, training_model
from trainer.job_run import JobRun, NoImprovement
from trainer.lease import Cancelled, Lease, Leases, Paused
from trainer.methods import METHODS
from trainer.methods.base import NewMethod
from trainer.step import score, step

LOST = "lost"  # how a job ends for this worker when another owns it or the store cannot be told
# Jobs that share a step. Arithmetic is the limit long before; a step should not take seconds.
MOST = 16
ASK_SECONDS = 0.5  # how often a busy worker looks for more jobs
FAILURES: dict[type[Exception], str] = {
    FloatingPointError: "training_diverged",
    NoImprovement: "no_improvement",
    torch.OutOfMemoryError: "out_of_memory",
    MemoryError: "out_of_memory",
}
OUT_OF_MEMORY = "DefaultCPUAllocator"  # what torch's RuntimeError names when a CPU has no more


def say(line: str) -> None:
    """One line for the operator."""
    print(f"antefix worker: {line}", flush=True)


class Worker:
    """Trains prefixes of one frozen model, as many jobs in one step as `memory_bytes` hold, by default what is free.

    Nothing that a job does ends the worker, or another job. `say` gets lines for people, `on_step` hears of every step
    taken, `on_end` how each job ended: a status or `lost`.
    """

    def __init__(
        self,
        store: Store,
        frozen: FrozenModel,
        name: str,
        *,
        methods: Mapping[str, NewMethod] = METHODS,
        memory_bytes: int | None = None,
        lease_seconds: float = 30.0,
        heartbeat_seconds: float = 4.0,
        checkpoint_seconds: float = 15.0,
        say: Callable[[str], None] = say,
        on_step: Callable[[], None] = lambda: None,
        on_end: Callable[[str], None] = lambda status: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self._store = store
        self._frozen = training_model.attach(frozen)
        self._methods = methods
        self._budget = memory.free(frozen.device) if memory_bytes is None else memory_bytes
        self._lease_seconds, self._checkpoint_seconds = lease_seconds, checkpoint_seconds
        self._say, self._on_step, self._on_end, self._clock = say, on_step, on_end, clock
        self._stopping = threading.Event()
        self._leases = Leases(store, lease_seconds, heartbeat_seconds)
        self._runs: list[JobRun] = []
        self._ended = 0
        self._ask_at = 0.0
        self._wanted = 0  # bytes that the job which found no room needs

    def run(self, poll_seconds: float = 0.5) -> None:
        """Works until stopped; a store that cannot be reached is asked again. Once only."""
        with self._leases:
            while not self._stopping.is_set():
                try:
                    busy = self._turn()
                except StoreUnavailable as error:
                    self._say(f"waiting for the store: {error.message}")
                    busy = False
                if not busy:
                    self._stopping.wait(poll_seconds)
            self._leave()

    def run_until_empty(self) -> int:
        """Works until nothing is left to claim and returns how many jobs were run. Once only."""
        with self._leases:
            while not self._stopping.is_set() and self._turn():
                pass
            self._leave()
        return self._ended

    def stop(self) -> None:
        """Ends `run` after the step under way, from any thread: every job is saved and back in the queue then."""
        self._stopping.set()

    def hand_back(self) -> None:
        """Puts every job back into the queue as it was last saved, from any thread: for a step that takes too long."""
        self._leases.hand_back()

    def _turn(self) -> bool:
        """A step of every run that trains and a slice for every one that validates; False if there was nothing to do.

        A job that was with a worker that died is tried alone until it is saved: else it might take others with it.
        """
        ended = self._ended
        self._admit()
        for run in list(self._runs):
            self._guard(run, run.lease.check)
        active = [run for run in self._runs if run.is_suspect] or list(self._runs)
        training = [run for run in active if run.validation is None]
        scoring = [run for run in active if run.validation is not None]
        if training:
            for run, loss in zip(training, step(self._frozen, [run.tuning for run in training]), strict=True):
                self._on_step()
                self._take(run, loss, run.stepped)
        if scoring:
            passes = [run.validation for run in scoring if run.validation is not None]
            for run, nats in zip(scoring, score(self._frozen, passes), strict=True):
                self._take(run, nats, run.scored)
        for run in [run for run in active if run in self._runs]:
            if run.tuning.done and run.validation is None:
                self._guard(run, partial(self._publish, run))
            elif run.wants_saving(self._checkpoint_seconds):
                self._guard(run, partial(self._save, run))
        return bool(active) or self._ended > ended

    def _admit(self) -> None:
        if self._runs and self._clock() < self._ask_at:
            return
        try:
            self._make_room()
            while self._has_room() and (job := self._store.jobs.claim(self.name, self._lease_seconds)) is not None:
                self._begin(job)
        except StoreUnavailable:
            if not self._runs:
                raise
        self._ask_at = self._clock() + ASK_SECONDS

    def _make_room(self) -> None:
        """Puts back the newest job of the tenant that has most here, where a tenant waits that has none.

        It is saved, so nothing is lost but its turn: nobody fills a worker for hours.
        """
        here = Counter(run.job.tenant for run in self._runs)
        if self._has_room() or self._stopping.is_set() or any(run.is_suspect for run in self._runs):
            return
        (tenant, most), *_ = here.most_common(1)
        if most > 1 and self._store.jobs.waiting() - here.keys():
            self._rest([run for run in self._runs if run.job.tenant == tenant][-1])

    def _has_room(self) -> bool:
        if self._stopping.is_set() or not self._runs:
            return not self._stopping.is_set()
        is_trying = any(run.is_suspect for run in self._runs)
        used = sum(run.cost for run in self._runs)
        return len(self._runs) < MOST and not is_trying and used + self._wanted <= self._budget

    def _begin(self, job: TrainingJob) -> None:
        for run in self._runs:
            if run.job.id == job.id:  # this worker was too slow to say that it is alive, and nobody else was faster
                run.lease.renew(job)
                return
        lease = self._leases.take(job)
        if self._stopping.is_set():
            self._put_back(lease)
            return
        self._say(f"{job.id}: {job.tenant}/{job.name}, attempt {job.attempt}")
        try:
            run = JobRun(self._store, self._frozen, self._methods, lease, self._say, self._clock)
        except Exception as error:
            self._fail(lease, error)
            return
        self._wanted = 0
        if self._runs and sum(run.cost for run in self._runs) + run.cost > self._budget:
            # another worker may have the room; this one takes no other before, so that it comes to its turn
            self._wanted = run.cost
            self._put_back(lease)
            return
        self._runs.append(run)

    def _take(self, run: JobRun, found: float | Exception, tell: Callable[[float], None]) -> None:
        def work() -> None:
            if isinstance(found, Exception):
                raise found
            tell(found)

        self._guard(run, work)

    def _guard(self, run: JobRun, work: Callable[[], None]) -> None:
        """Whatever it raises ends this run, and no other."""
        try:
            work()
        except Exception as error:
            self._runs.remove(run)
            if isinstance(error, Paused):
                with suppress(LeaseLost, StoreUnavailable):
                    run.save()
            self._fail(run.lease, error)

    def _save(self, run: JobRun) -> None:
        was_tried = run.is_suspect
        with suppress(StoreUnavailable):  # it goes on, and tries again later
            run.save()
        if was_tried and not run.is_suspect:
            self._ask_at = 0.0  # others have waited for this

    def _publish(self, run: JobRun) -> None:
        version = run.publish()
        self._runs.remove(run)
        self._say(f"{run.job.id}: published {version.ref}")
        self._end(run.lease, JobStatus.SUCCEEDED)

    def _fail(self, lease: Lease, error: Exception) -> None:
        job = lease.job
        if isinstance(error, Cancelled):
            self._end(lease, self._finish(job, JobStatus.CANCELLED))
        elif isinstance(error, Paused):
            self._end(lease, self._finish(job, JobStatus.PAUSED))
        elif isinstance(error, LeaseLost | StoreUnavailable):
            self._say(f"{job.id}: " + ("handed back" if lease.handed_back else f"nothing published: {error.message}"))
            self._end(lease, JobStatus.QUEUED if lease.handed_back else LOST)
        else:
            self._end(lease, self._finish(job, JobStatus.FAILED, explain(error)))

    def _finish(self, job: TrainingJob, status: JobStatus, error: JobError | None = None) -> str:
        try:
            status = self._store.jobs.finish(job, status, error).status
        except (LeaseLost, StoreUnavailable):
            return LOST
        self._say(f"{job.id}: {status}" + (f" ({error.code}): {error.message}" if error is not None else ""))
        return status

    def _put_back(self, lease: Lease) -> None:
        lease.hand_back()
        self._leases.drop(lease)

    def _end(self, lease: Lease, status: str) -> None:
        self._leases.drop(lease)
        self._ended, self._ask_at = self._ended + 1, 0.0
        self._on_end(status)

    def _leave(self) -> None:
        """Saves every run and puts its job back into the queue."""
        for run in list(self._runs):
            self._rest(run)

    def _rest(self, run: JobRun) -> None:
        with suppress(LeaseLost, StoreUnavailable):
            run.save()
        run.lease.hand_back()
        self._runs.remove(run)
        self._say(f"{run.job.id}: handed back")
        self._end(run.lease, JobStatus.QUEUED)


def explain(error: Exception) -> JobError:
    """A failure as its job records it; what nobody foresaw is also printed in full."""
    if isinstance(error, AntefixError):
        return JobError(error.code, error.message)
    if isinstance(error, RuntimeError) and OUT_OF_MEMORY in str(error):
        return JobError("out_of_memory", str(error)[:500])
    for kind, code in FAILURES.items():
        if isinstance(error, kind):
            return JobError(code, str(error)[:500] or code)
    traceback.print_exception(error)
    return JobError("training_failed", f"{type(error).__name__}: {error}"[:500])
