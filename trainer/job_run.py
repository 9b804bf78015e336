"""One claimed job: from its examples, or its last checkpoint, to its published prefix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

from prefix_store.errors import PayloadTooLarge, StoreCorrupt, StoreUnavailable
from prefix_store.job_model import check_model
from prefix_store.jobs import TrainingJob
from prefix_store.model.frozen import FrozenModel
from prefix_store.prefix import PrefixVersion
from prefix_store.store import Store
from trainer import data, memory, samples, source, teacher
from trainer.data import Example
from trainer.lease import Lease
from trainer.methods import size
from trainer.methods.base import NewMethod
from trainer.methods.start import Start
from trainer.progress import Meter, Progress, line, summary
from trainer.slices import Sliced
from trainer.tuning import StateMismatch, Tuning, is_due, saved_source
from trainer.validation import Validation

LINES, POINTS = 10, 100  # a run: lines printed, points of its loss curve
TURN_SECONDS = 60.0  # after which a run may make way for a tenant that has none; beginning takes seconds itself
# So many times as long as saving took, a run goes on before it saves again.
SAVING_SHARE = 20


class NoImprovement(Exception):
    """Validation found the prefix no better than none or than its start, and nobody asked for it all the same."""


class JobRun:
    """Trains under a lease, tells how it goes, and publishes.

    Somebody else takes the steps, perhaps with other runs: of the `tuning` while there is no `validation` under way,
    else the slices of that; and says what came of them. `cost`: about how many bytes it takes. `can_be_saved`: whether
    nothing has been found to speak against it.
    """

    def __init__(
        self,
        store: Store,
        frozen: FrozenModel,
        new_method: NewMethod,
        lease: Lease,
        parts: data.TrainingData,
        say: Callable[[str], None],
        clock: Callable[[], float],
        budget: int,
    ) -> None:
        """Reads the checkpoint, if there is one. `budget`: bytes that there are for all runs.

        Raises TooLarge, PrefixMismatch, PrefixNotFound, InvalidRequest, ModelUnsupported, StoreUnavailable and
        StoreCorrupt.
        """
        self.lease = lease
        self._store, self._frozen, self._say, self._clock = store, frozen, say, clock
        self._tell(parts.summary, chosen={name: getattr(parts.spec, name) for name in parts.chosen})
        self._spec, self._valid = parts.spec, parts.valid
        saved = self._saved()
        start = self._start(saved, parts.train)
        if (known := size.tuned(frozen, self._spec, start)) is not None:
            memory.check_state(self._spec, known, budget)
        method = new_method(frozen, self._spec, start)
        tuned = sum(parameter.numel() for parameter in method.parameters())
        memory.check_state(self._spec, tuned, budget)
        origin = start if isinstance(start, dict) else None
        self.tuning = Tuning(method, parts.train, self._spec, validates=bool(parts.valid), source=origin)
        self._take_up(saved)
        self.cost = memory.of_run(frozen, parts, tuned)
        self.is_suspect, self.can_be_saved = self.job.lapses > 0, True
        self._meter = Meter(self.tuning, clock)
        self._begun_at = clock()
        self._saved_step, self._saved_at, self._saving = self.tuning.step, self._begun_at, 0.0
        self.validation = self._next_validation()

    @property
    def job(self) -> TrainingJob:
        """As it was when it was last claimed."""
        return self.lease.job

    @property
    def had_turn(self) -> bool:
        """Whether it has been here for as long as nobody else may ask for its room."""
        return self._clock() - self._begun_at >= TURN_SECONDS

    def stepped(self, loss: float) -> None:
        """After a step of the tuning. Raises LeaseLost."""
        self.validation = self._next_validation()
        if self.validation is None:
            self._hear(self._meter.progress(loss, None))

    def scored(self, nats: float) -> None:
        """After a slice of the validation. Raises LeaseLost, FloatingPointError."""
        assert self.validation is not None
        self.validation.add(nats)
        if not self.validation.done:
            return
        loss = self.validation.loss
        if self.validation.is_bare:
            self.tuning.bare_loss = loss
        else:
            self.tuning.judge(loss)
            if self.tuning.loss is not None:
                self._hear(self._meter.progress(self.tuning.loss, loss))
        self.validation = self._next_validation()

    def publish(self) -> PrefixVersion:
        """Saves the prefix as the next version of its name.

        Raises NoImprovement, LeaseLost, QuotaExceeded and StoreUnavailable.
        """
        result = self.tuning.result()
        self.lease.beat()  # where it ended, if that was early
        self._tell(summary(result), kept={"step": result.step, "valid_loss": result.valid_loss})
        if not (result.improves or self._spec.publish_anyway):
            raise NoImprovement(
                f"the validation loss is {result.valid_loss:.4f} with the prefix, {result.start_loss:.4f} with what it "
                f"started from and {result.bare_loss:.4f} with none, so it is not published; "
                "publish_anyway publishes it all the same"
            )
        job, by = self.job, f"worker {self.job.worker}"
        manifest = dataclasses.replace(self.tuning.method.manifest(), template=self._spec.template)
        shown = samples.make(self._frozen, manifest, result.tensors, self._valid, self.lease.check)
        self._add_event("samples", {"samples": shown})
        return self._store.prefixes.save(job.tenant, job.name, manifest, result.tensors, job=job, by=by)

    def wants_saving(self, seconds: float) -> bool:
        """Whether it is time for a checkpoint, of which there is one in so many seconds, fewer if they are dear."""
        return self._clock() - self._saved_at >= max(seconds, SAVING_SHARE * self._saving)

    def save(self) -> None:
        """Makes where the run stands now what another worker would go on from. Raises LeaseLost, StoreUnavailable.

        One that is too large for the store is given up, with a word to its owner: the run then begins anew.
        """
        begun = self._saved_at = self._clock()
        if self.tuning.step == self._saved_step:
            return
        try:
            self._store.jobs.save_checkpoint(self.job, self.tuning.to_bytes(self._frozen.digest))
        except PayloadTooLarge as error:
            self.can_be_saved = False
            self._tell(f"no checkpoint of step {self.tuning.step}: {error.message}")
        self._saved_step = self.tuning.step
        self.is_suspect, self._saving = False, self._clock() - begun

    def _start(self, saved: bytes | None, examples: Sequence[Example]) -> Start:
        """What the method starts from; a prefix that was deleted since the run began is in its checkpoint."""
        if saved is not None:
            with suppress(StateMismatch):  # taking it up will say so
                if (found := saved_source(saved)) is not None:
                    return found
        return source.start(self._store, self.job, self._frozen, examples)

    def _saved(self) -> bytes | None:
        """The checkpoint, if there is one that can be read."""
        try:
            return self._store.jobs.checkpoint(self.job)
        except StoreCorrupt as error:
            self._begin_anew(error)
            return None

    def _take_up(self, saved: bytes | None) -> None:
        if saved is None:
            return
        try:
            self.tuning.load(saved, self._frozen.digest)
        except StateMismatch as error:
            self._begin_anew(error)
        else:
            self._tell(f"going on from step {self.tuning.step}")

    def _begin_anew(self, error: Exception) -> None:
        self._tell(f"its checkpoint cannot be used, so it begins anew: {error}")

    def _next_validation(self) -> Validation | None:
        if self._valid and self.tuning.bare_loss is None:
            return Validation(self._valid, self._spec.batch_size, None)
        if self.tuning.due:
            return Validation(self._valid, self._spec.batch_size, self.tuning.method.rows)
        return None

    def _hear(self, progress: Progress) -> None:
        found = dataclasses.asdict(progress)
        # only some steps validate; between them the last one counts
        self.lease.progress = {**self.lease.progress, **{name: n for name, n in found.items() if n is not None}}
        if is_due(progress.step, progress.total_steps, LINES):
            self._say(f"{self.job.id}: {line(progress)}")
            self.lease.beat()
        if progress.valid_loss is not None or is_due(progress.step, progress.total_steps, POINTS):
            self._add_event("metrics", found)

    def _tell(self, message: str, **more: object) -> None:
        self._say(f"{self.job.id}: {message}")
        self._add_event("message", {"message": message, **more})

    def _add_event(self, kind: str, content: dict[str, object]) -> None:
        # a gap in the history is no reason to end a run
        with suppress(StoreUnavailable):
            self._store.jobs.add_event(self.job, kind, content)


def begin(
    store: Store,
    frozen: FrozenModel,
    methods: Mapping[str, NewMethod],
    lease: Lease,
    say: Callable[[str], None],
    clock: Callable[[], float],
    budget: int,
) -> Sliced[JobRun]:
    """Makes a claimed job, of one of these methods, ready to train, a line of its examples at a time.

    Raises what JobRun does, InvalidRequest where no such model can do it, InvalidTrainingData, ChatTemplateMissing and
    ContextLengthExceeded.
    """
    spec = lease.job.spec
    check_model(spec.to_json(), frozen.geometry)
    rows = []
    for row in store.jobs.lines(lease.job):
        rows.append(row)
        yield
    parts = yield from data.preparing(frozen, spec, rows[: spec.examples], rows[spec.examples :])
    if parts.spec.context is not None:
        ask = partial(teacher.teaching, frozen, parts.spec.context, batch_size=parts.spec.batch_size)
        train, valid = (yield from ask(parts.train)), (yield from ask(parts.valid))
        parts = dataclasses.replace(parts, train=train, valid=valid)
    return JobRun(store, frozen, methods[spec.method], lease, parts, say, clock, budget)
