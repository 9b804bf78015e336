"""Claims jobs and sees each to its end, many at a time. The store is its only contact with the rest of the world."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial

from prefix_store.errors import LeaseLost, StoreUnavailable
from prefix_store.job_needs import Needs
from prefix_store.jobs import JobError, JobStatus, TrainingJob
from prefix_store.model import shortage
from prefix_store.model.frozen import FrozenModel
from prefix_store.store import Store
from trainer import memory, training_model
from trainer.failures import explain
from trainer.job_run import JobRun, begin
from trainer.lease import LOST, Cancelled, Lease, Leases, Paused
from trainer.methods import METHODS
from trainer.methods.base import NewMethod
from trainer.progress import say
from trainer.room import Room
from trainer.slices import Sliced
from trainer.step import score, step

# How often a busy worker looks for more jobs; less often, to a limit, where that takes more than so much of the time,
# as it does where thousands wait for other workers.
ASK_SECONDS, ASK_SECONDS_MOST, ASK_SHARE = 0.5, 5.0, 0.05
# A job that begins is made ready between the steps of others, and one that is trained is published, each for so much of
# the time that a step takes; or while nobody trains, for so many seconds before the worker looks up.
SHARE, SLICE_SECONDS = 0.5, 0.5


class Worker:
    """Trains prefixes of one frozen model, as many jobs in one step as `memory_bytes` hold, by default what is free.

    Nothing that a job does ends the worker, or another job. `say` gets lines for people, `on_step` hears of every step
    taken, `on_pack` of the tokens and seconds of all that shared it, `on_end` how each job ended: a status or `lost`.
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
        on_pack: Callable[[int, float], None] = lambda tokens, seconds: None,
        on_end: Callable[[str], None] = lambda status: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self._store = name, store
        self._frozen = training_model.attach(frozen)
        self._methods = methods
        self._lease_seconds, self._checkpoint_seconds = lease_seconds, checkpoint_seconds
        self._say, self._on_step, self._on_pack, self._on_end, self._clock = say, on_step, on_pack, on_end, clock
        self._stopping = threading.Event()
        self._leases = Leases(store, lease_seconds, heartbeat_seconds)
        self._runs: list[JobRun] = []
        self._ended, self._ask_at, self._took = 0, 0.0, 0.0  # `took`: seconds of the last step
        self._room = Room(memory.free(frozen.device) if memory_bytes is None else memory_bytes, self._runs)
        self._passed_by = 0  # jobs that waited for other workers when it was last said
        self._coming: tuple[Lease, Sliced[JobRun]] | None = None  # claimed, and not ready to train

    def run(self, poll_seconds: float = 0.5) -> None:
        """Works until stopped; a store that cannot be reached is asked again. Once only."""
        with self._leases:
            while not self._stopping.is_set():
                begun, wait = self._clock(), poll_seconds
                try:
                    if self._turn():
                        continue
                    wait = max(wait, min((self._clock() - begun) / ASK_SHARE, ASK_SECONDS_MOST))
                except StoreUnavailable as error:
                    self._say(f"waiting for the store: {error.message}")
                self._stopping.wait(wait)
            self._leave()

    def run_until_empty(self) -> int:
        """Works until nothing is left to claim and returns how many jobs were run. Once only."""
        with self._leases:
            while not self._stopping.is_set():
                if self._turn():
                    continue
                if not self._runs:
                    break
                self._stopping.wait(ASK_SECONDS)  # for the store, which is to take what is trained
            self._leave()
        return self._ended

    def stop(self) -> None:
        """Ends `run` after the step under way, from any thread: every job is saved and back in the queue then."""
        self._stopping.set()

    def hand_back(self) -> None:
        """Puts every job back into the queue as it was last saved, from any thread: for a step that takes too long."""
        self._leases.hand_back()

    @property
    def load(self) -> tuple[int, int, int]:
        """How many jobs train now, the bytes that a step of them takes, and how many it may take."""
        return len(self._runs), self._room.used, self._room.limit

    def _turn(self) -> bool:
        """A step of who trains, a slice of who validates, some of who is trained; False if there was nothing to do.

        A job that was with a worker that died is tried alone until it is saved: else it might take others with it.
        """
        ended = self._ended
        self._leases.check()
        for run in list(self._runs):  # first, for what was handed back is there to be claimed
            self._guard(run, run.lease.check)
        self._admit()
        active = [run for run in self._runs if run.is_suspect] or list(self._runs)
        training = [run for run in active if run.validation is None and not run.is_trained]
        scoring = [run for run in active if run.validation is not None]
        begun = self._clock()
        if training:
            losses = step(self._frozen, [run.tuning for run in training], self._apart)
            for run, loss in zip(training, losses, strict=True):
                self._on_step()
                self._guard(run, partial(run.stepped, loss))
            tokens = sum(run.tuning.batch_tokens for run in training if run in self._runs)
            self._on_pack(tokens, self._clock() - begun)
        if scoring:
            passes = [run.validation for run in scoring if run.validation is not None]
            for run, nats in zip(scoring, score(self._frozen, passes, self._apart), strict=True):
                self._guard(run, partial(run.scored, nats))
        trained = [run for run in active if run in self._runs and run.is_trained and not run.waits]
        until = self._clock() + (SHARE * (self._clock() - begun) if training or scoring else SLICE_SECONDS)
        for run in trained:
            if run is trained[0] or self._clock() < until:
                self._guard(run, partial(self._publish, run, until))
        self._took = self._clock() - begun
        for run in [run for run in active if run in self._runs and run.wants_saving(self._checkpoint_seconds)]:
            self._guard(run, partial(self._save, run))
        while (newest := self._room.too_many()) is not None:
            self._rest(newest)
        return bool(training or scoring or trained) or self._coming is not None or self._ended > ended

    def _apart(self, error: Exception) -> None:
        """Those that could not share a step for want of memory will not try again: the newest makes way."""
        if shortage.ran_out(error):
            self._room.shrink()

    def _admit(self) -> None:
        if not self._runs:
            self._room.empty()
        until = self._clock() + (SHARE * self._took if self._runs else SLICE_SECONDS)
        if not self._is_ready(until) or (self._runs and self._clock() < self._ask_at):
            return
        begun = self._clock()
        try:
            self._make_room()
            while self._room.is_there and not self._stopping.is_set() and (job := self._claim()) is not None:
                self._begin(job)
                if not self._is_ready(until):
                    return
                begun = self._clock()
        except StoreUnavailable:
            if not self._runs:
                raise
        self._ask_at = self._clock() + max(ASK_SECONDS, min((self._clock() - begun) / ASK_SHARE, ASK_SECONDS_MOST))

    def _make_room(self) -> None:
        """A run makes way where a tenant waits that has none: saved, so that it loses nothing but its turn."""
        if self._stopping.is_set() or (run := self._room.making_way(self._store.jobs, self._takes)) is None:
            return
        with suppress(LeaseLost):  # it is told so before its next step
            run.save()
            if run.can_be_saved:
                self._leave_run(run, run.lease.make_way)

    def _takes(self, needs: Needs) -> bool:
        return needs.base_digest in (None, self._frozen.digest) and needs.method in self._methods

    def _claim(self) -> TrainingJob | None:
        job = self._store.jobs.claim(self.name, self._lease_seconds, self._takes)
        passed_by = self._store.jobs.passed_by
        if job is None and passed_by != self._passed_by:
            self._passed_by = passed_by
            self._say(f"jobs that wait for a worker with another model or method: {passed_by}")
        return job

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
        budget = self._room.budget
        self._coming = lease, begin(self._store, self._frozen, self._methods, lease, self._say, self._clock, budget)

    def _is_ready(self, until: float) -> bool:
        """Goes on with the job that is coming until a time, and at least by a slice; True once there is none."""
        if self._coming is None:
            return True
        lease, work = self._coming
        try:
            lease.check()
            next(work)
            while self._clock() < until:
                next(work)
        except StopIteration as end:
            self._join(lease, end.value)
        except Exception as error:
            self._coming = None
            self._fail(lease, error)
        return self._coming is None

    def _join(self, lease: Lease, run: JobRun) -> None:
        self._coming = None
        if self._room.fits(run.cost):
            self._runs.append(run)
        else:
            self._put_back(lease)  # another worker may have the room

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

    def _publish(self, run: JobRun, until: float) -> None:
        if (version := run.publish(until)) is not None:
            self._runs.remove(run)
            self._say(f"{run.job.id}: published {version.ref}")
            self._end(run.lease, JobStatus.SUCCEEDED)

    def _fail(self, lease: Lease, error: Exception) -> None:
        job = lease.job
        if isinstance(error, Cancelled):
            self._finish(lease, JobStatus.CANCELLED)
        elif isinstance(error, Paused):
            self._finish(lease, JobStatus.PAUSED)
        elif isinstance(error, LeaseLost | StoreUnavailable):
            self._say(f"{job.id}: " + ("handed back" if lease.handed_back else f"nothing published: {error.message}"))
            self._end(lease, JobStatus.QUEUED if lease.handed_back else LOST)
        else:
            self._finish(lease, JobStatus.FAILED, explain(error))

    def _finish(self, lease: Lease, status: JobStatus, error: JobError | None = None) -> None:
        ended = lease.finish(status, error)
        if ended != LOST:
            why = f" ({error.code}): {error.message}" if error is not None else ""
            self._say(f"{lease.job.id}: {ended}{why}")
        self._end(lease, ended)

    def _put_back(self, lease: Lease) -> None:
        lease.hand_back()
        self._leases.drop(lease)

    def _end(self, lease: Lease, status: str) -> None:
        self._leases.drop(lease)
        self._ended, self._ask_at = self._ended + 1, 0.0
        self._on_end(status)

    def _leave(self) -> None:
        """Saves every run and puts its job back into the queue."""
        if self._coming is not None:
            self._put_back(self._coming[0])
            self._coming = None
        for run in list(self._runs):
            self._rest(run)

    def _rest(self, run: JobRun) -> None:
        with suppress(LeaseLost, StoreUnavailable):
            run.save()
        self._leave_run(run, run.lease.hand_back)

    def _leave_run(self, run: JobRun, hand_over: Callable[[], None]) -> None:
        hand_over()
        self._runs.remove(run)
        self._say(f"{run.job.id}: handed back")
        self._end(run.lease, JobStatus.QUEUED)
