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
from trainer import data, memory, source, teacher
from trainer.data import Example
from trainer.lease import Lease
from trainer.methods import size
from trainer.methods.base import NewMethod
from trainer.methods.start import Start
from trainer.progress import Meter, Progress, line, summary
from trainer.publication import Publication
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
    else the slices of that; says what came of them, and has it `publish` once it `is_trained`. `can_be_saved`: whether
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
        self._cost = memory.of_run(frozen, parts, tuned)
        self.is_suspect, self.can_be_saved = self.job.lapses > 0, True
        self._meter = Meter(self.tuning, clock)
        self._begun_at = clock()
        self._saved_step, self._saved_at, self._saving = self.tuning.step, self._begun_at, 0.0
        self.validation = self._next_validation()
        self._publication: Publication | None = None

    @property
    def job(self) -> TrainingJob:
        """As it was when it was last claimed."""
        return self.lease.job

    @property
    def had_turn(self) -> bool:
        """Whether it has been here for as long as nobody else may ask for its room."""
        return self._clock() - self._begun_at >= TURN_SECONDS

    def stepped(self, found: float | Exception) -> None:
        """After a step of the tuning: its loss, or what ended it, which is raised. Raises LeaseLost."""
        loss = _number(found)
        self.validation = self._next_validation()
        if self.validation is None:
            self._hear(self._meter.progress(loss, None))

    def scored(self, found: float | Exception) -> None:
        """After a slice of the validation: its nats, or what ended it. Raises that, LeaseLost, FloatingPointError."""
        assert self.validation is not None
        self.validation.add(_number(found))
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

    @property
    def is_trained(self) -> bool:
        """Whether nothing is left but to `publish`."""
        return self.tuning.done and self.validation is None

    @property
    def cost(self) -> int:
        """About how many bytes a step takes; none once there are no more."""
        return 0 if self.is_trained else self._cost

    @property
    def waits(self) -> bool:
        """Whether it is trained, and the store is not to be tried yet."""
        return self._publication is not None and self._publication.waits

    def publish(self, until: float) -> PrefixVersion | None:
        """Goes on until a time, and at least by a slice, with what ends in the next version of the prefix's name.

        None while it is not there yet: the samples are not made, or the store cannot take it. Raises NoImprovement,
        LeaseLost and QuotaExceeded.
        """
        if self._publication is None:
            self._publication = self._new_publication()
        publication = self._publication
        if publication.samples is None:
            if not publication.show(until):
                return None
            self._add_event("samples", {"samples": publication.samples})
            self.is_suspect = False  # nothing is left that could take others with it
        return publication.save(self.job)

    def _new_publication(self) -> Publication:
        result = self.tuning.result()
        self.lease.beat()  # where it ended, if that was early
        self._tell(summary(result), kept={"step": result.step, "valid_loss": result.valid_loss})
        if not (result.improves or self._spec.publish_anyway):
            raise NoImprovement(
                f"the validation loss is {result.valid_loss:.4f} with the prefix, {result.start_loss:.4f} with what it "
                f"started from and {result.bare_loss:.4f} with none, so it is not published; "
                "publish_anyway publishes it all the same"
            )
        manifest = dataclasses.replace(self.tuning.method.manifest(), template=self._spec.template)
        parts = self._store, self._frozen, manifest, result.tensors, self._valid
        return Publication(*parts, self._tell, self._clock)

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


def _number(found: float | Exception) -> float:
    if isinstance(found, Exception):
        raise found
    return found


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
