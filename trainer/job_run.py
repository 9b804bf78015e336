"""One claimed job: from its examples to its published prefix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial

from prefix_store.errors import InvalidRequest, PrefixMismatch, StoreUnavailable
from prefix_store.model.frozen import FrozenModel
from prefix_store.prefix import PrefixVersion
from prefix_store.store import Store
from trainer import data, samples, source, teacher
from trainer.data import Example
from trainer.evaluate import nats_per_token
from trainer.lease import Lease
from trainer.loop import Fit, Progress, fit, is_due
from trainer.methods.base import NewMethod, TuningMethod

LINES, POINTS = 10, 100  # a run: lines printed, points of its loss curve


class JobRun:
    """Trains under a lease, tells how it goes, and publishes. Every step first asks the lease whether to go on."""

    def __init__(
        self,
        store: Store,
        frozen: FrozenModel,
        methods: Mapping[str, NewMethod],
        lease: Lease,
        say: Callable[[str], None],
        on_step: Callable[[], None],
    ) -> None:
        self._store, self._frozen, self._methods, self._lease = store, frozen, methods, lease
        self._say, self._on_step = say, on_step
        self._job, self._spec = lease.job, lease.job.spec

    def publish(self) -> PrefixVersion:
        """Trains the prefix and saves it as the next version of its name.

        Raises what the lease raises, PrefixMismatch, PrefixNotFound, InvalidTrainingData, InvalidRequest,
        ModelUnsupported, FloatingPointError and StoreUnavailable.
        """
        if self._spec.base_digest not in (None, self._frozen.digest):
            raise PrefixMismatch(
                f"the job was queued for another base model: expected {str(self._spec.base_digest)[:12]}…, "
                f"this worker has {self._frozen.digest[:12]}…"
            )
        new_method = find(self._methods, self._spec.method)
        jobs = self._store.jobs
        validation = jobs.validation_examples(self._job)
        parts = data.prepare(self._frozen, self._spec, jobs.examples(self._job), validation)
        self._tell(parts.summary, chosen={name: getattr(parts.spec, name) for name in parts.chosen})
        self._spec = parts.spec
        if self._spec.context is not None:
            ask = partial(teacher.taught, self._frozen, self._spec.context, batch_size=self._spec.batch_size)
            train, valid = (ask(examples, check=self._lease.check) for examples in (parts.train, parts.valid))
            parts = dataclasses.replace(parts, train=train, valid=valid)
        start = source.start(self._store, self._job, self._frozen, parts.train)
        method = new_method(self._frozen, self._spec, start)
        validate = partial(self._validate, method, parts.valid) if parts.valid else None
        result = fit(self._frozen, method, parts.train, self._spec, validate=validate, on_progress=self._hear)
        self._tell(summary(result))
        job, by = self._job, f"worker {self._job.worker}"
        manifest = dataclasses.replace(method.manifest(), template=self._spec.template)
        shown = samples.make(self._frozen, manifest, result.tensors, parts.valid, self._lease.check)
        self._add_event("samples", {"samples": shown})
        return self._store.prefixes.save(job.tenant, job.name, manifest, result.tensors, job=job, by=by)

    def _validate(self, method: TuningMethod, examples: list[Example]) -> float:
        return nats_per_token(self._frozen, method.rows, self._batches(examples))

    def _batches(self, examples: list[Example]) -> Iterator[Sequence[Example]]:
        for batch in data.batches(examples, self._spec.batch_size):
            self._lease.check()
            yield batch

    def _hear(self, progress: Progress) -> None:
        self._lease.check()
        self._on_step()
        self._lease.progress = dataclasses.asdict(progress)
        if is_due(progress.step, progress.total_steps, LINES):
            self._say(f"{self._job.id}: {line(progress)}")
            self._lease.beat()
        if progress.valid_loss is not None or is_due(progress.step, progress.total_steps, POINTS):
            self._add_event("metrics", self._lease.progress)

    def _tell(self, message: str, **more: object) -> None:
        self._say(f"{self._job.id}: {message}")
        self._add_event("message", {"message": message, **more})

    def _add_event(self, kind: str, content: dict[str, object]) -> None:
        # a gap in the history is no reason to end a run
        with suppress(StoreUnavailable):
            self._store.jobs.add_event(self._job, kind, content)


def find(methods: Mapping[str, NewMethod], name: str) -> NewMethod:
    """The method of that name. Raises InvalidRequest where the worker has none; the server may know of more."""
    if name not in methods:
        raise InvalidRequest(
            f"this worker has no method {name!r}, only {', '.join(methods)}; ANTEFIX_METHODS gives it more",
            param="method",
        )
    return methods[name]


def line(progress: Progress) -> str:
    """A step for people to read."""
    valid = f", validation {progress.valid_loss:.3f}" if progress.valid_loss is not None else ""
    return (
        f"step {progress.step}/{progress.total_steps}, loss {progress.train_loss:.3f}{valid}, "
        f"{progress.tokens_per_second:,.0f} tokens/s, {progress.seconds_left:.0f} s left"
    )


def summary(result: Fit) -> str:
    """What was gained, for people to read."""
    if result.valid_loss is None:
        return f"keeping step {result.step}; too few examples to validate on"
    return f"keeping step {result.step}: validation loss {result.start_loss:.3f} before, {result.valid_loss:.3f} after"
