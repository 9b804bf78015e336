"""What has been asked of the trainer: jobs, and the examples they train on."""

from __future__ import annotations

import dataclasses
import secrets
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from prefix_store import audit, codec, holds, job_records, job_start, layout
from prefix_store.backends.base import Backend, Blobs, Transaction
from prefix_store.catalog import Catalog
from prefix_store.errors import InvalidName, InvalidRequest, PrefixNotFound, StoreCorrupt
from prefix_store.examples import VALIDATION, Example, from_jsonl, to_jsonl
from prefix_store.job_queue import JobQueue
from prefix_store.jobs import (
    BUILT_IN_METHODS,
    CHOSEN_BY_DATA,
    DEFAULTS,
    METHODS_WITH,
    TRAINABLE_OBJECTIVES,
    JobEvent,
    JobStatus,
    Objective,
    TrainingJob,
    TrainingSpec,
)
from prefix_store.prefix import PrefixManifest, PrefixRef, PrefixVersion, check_metadata, check_name

NO_OPTIONS = {"data_digest", "examples", "validation_examples", "unset"}
OPTIONS = frozenset(field.name for field in dataclasses.fields(TrainingSpec)) - NO_OPTIONS
LAST_EVENT = 10**9 - 1
_ID_ALPHABET = string.ascii_letters + string.digits


class JobStore(JobQueue):
    """Jobs, their history and their training data."""

    def __init__(self, backend: Backend, blobs: Blobs) -> None:
        super().__init__(backend)
        self._blobs = blobs

    def submit(
        self,
        tenant: str,
        name: str,
        examples: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
        methods: Sequence[str] = BUILT_IN_METHODS,
        by: str = audit.LOCAL,
        also: Callable[[Transaction, TrainingJob], None] | None = None,
        validation: Sequence[Mapping[str, Any]] = (),
        about: Mapping[str, Any] | None = None,
        fits: job_start.Fits = lambda manifest: None,
    ) -> TrainingJob:
        """Queues the training of `tenant/name` on examples of any of the shapes in examples.py.

        `options`: fields of TrainingSpec. `methods`: the names that its `method` may have. `also` is done in the
        transaction that queues. `validation`: examples to judge by; none sets some of the others aside. `about`: the
        job's `training_file`, `validation_file` and `metadata`. `fits` raises PrefixMismatch for a prefix that does not
        fit the model, which the store does not know. Raises InvalidName, InvalidTrainingData with the line,
        InvalidRequest with the field, PrefixNotFound for an `init_from` that the tenant may not use, PrefixMismatch for
        one that the job cannot start from, QuotaExceeded, and what `also` raises.
        """
        check_name(tenant, "tenant")
        check_name(name)
        data = to_jsonl(examples) + to_jsonl(validation, VALIDATION)
        _check_options(options, methods)
        source = self._source(tenant, options.get("init_from"))
        started = {"init_from": options.get("init_from")}
        if source is not None:
            version, manifest = source
            job_start.check_kind(options.get("method", TrainingSpec.method), str(version.ref), manifest)
            started = {"init_from": str(version.ref), "virtual_tokens": _length(version, options.get("virtual_tokens"))}
        spec = _spec(codec.digest_of(data), len(examples), len(validation), options, started)
        if source is not None:
            job_start.check(spec, source[1], fits)
        job = TrainingJob(_new_id(), tenant, name, spec, JobStatus.QUEUED, created_at=0.0, **(about or {}))
        check_metadata(job.metadata)
        with holds.held(self._backend, tenant, spec.data_digest) as hold:
            self._blobs.put(data)
            return self._backend.write(partial(_enqueue, job, by, hold, also))

    def _source(self, tenant: str, asked: Any) -> tuple[PrefixVersion, PrefixManifest] | None:
        """The one version that `init_from` means now, for the job may run later, and what it is.

        None where nothing is asked for, or no reference, which is left for the specification to refuse.
        """
        if not isinstance(asked, str):
            return None
        try:
            ref = PrefixRef.parse(asked, tenant)
        except InvalidName as error:
            raise InvalidName(f"init_from: {error.message}", param="init_from") from None
        catalog = Catalog(self._backend)
        if (version := catalog.find(ref, tenant)) is None:
            raise _absent(asked)
        try:
            with self._blobs.file(version.digest) as path:
                return version, codec.read_manifest(path)
        except StoreCorrupt:
            if catalog.find(version.ref, tenant) is None:  # what was deleted since has no file
                raise _absent(asked) from None
            raise

    def job(self, tenant: str, job_id: str) -> TrainingJob | None:
        """The job, or None."""
        with self._backend.view() as view:
            record = job_records.find(view, job_id, tenant)
        return record.job if record is not None else None

    def jobs(
        self,
        tenant: str,
        after: str | None,
        limit: int,
        wanted: Callable[[TrainingJob], bool] = lambda job: True,
    ) -> list[TrainingJob]:
        """Newest first, only those that are wanted; `after` is the last job id of the page before.

        Raises InvalidRequest for an `after` that is no job's.
        """
        jobs: list[TrainingJob] = []
        with self._backend.view() as view:
            last = job_records.find(view, after, tenant) if after is not None else None
            if after is not None and last is None:
                raise InvalidRequest(f"after must be the id of a job, got {after[:80]!r}", param="after")
            before = layout.jobs("jobs", tenant, last.number).rpartition("/")[2] if last is not None else ""
            while len(jobs) < limit:
                page = view.scan(layout.jobs("jobs", tenant), after=before, limit=limit, descending=True)
                found = view.get_many([layout.job(job_id) for _, job_id in page])
                jobs += filter(wanted, (TrainingJob.from_json(data) for data in found if data is not None))
                if len(page) < limit:
                    break
                before = page[-1][0]
        return jobs[:limit]

    def job_counts(self) -> dict[JobStatus, int]:
        """How many jobs stand in each state, over all tenants."""
        with self._backend.view() as view:
            usages = view.scan("usage/")
        totals: Counter[str] = Counter()
        for _, usage in usages:
            totals.update(usage["jobs"])
        return {status: totals[status] for status in JobStatus}

    def events(self, tenant: str, job_id: str, after: int, limit: int, *, newest_first: bool = False) -> list[JobEvent]:
        """Events with a sequence above `after`, oldest first; or below it, newest first, all of them if it is 0."""
        with self._backend.view() as view:
            if job_records.find(view, job_id, tenant) is None:
                return []
            place = layout.event(job_id, min(after, LAST_EVENT)).rpartition("/")[2]
            page = view.scan(layout.event(job_id), after=place if after else "", limit=limit, descending=newest_first)
        return [JobEvent(**data) for _, data in page]

    def save_checkpoint(self, job: TrainingJob, data: bytes) -> None:
        """Makes these bytes what the job goes on from when it is next claimed; those before them are removed.

        Whoever does this gets on: attempts are counted anew. Raises LeaseLost, StoreUnavailable, PayloadTooLarge.
        """
        digest = codec.digest_of(data)

        def work(transaction: Transaction) -> str | None:
            holds.release(transaction, hold)
            record = job_records.owned(transaction, job)
            job_records.change(transaction, record, checkpoint=digest, lapses=0)
            return record.job.checkpoint

        with holds.held(self._backend, job.tenant, digest) as hold:
            self._blobs.put(data)
            before = self._backend.write(work)
        if before not in (None, digest):
            self._blobs.remove_unless(before, partial(holds.is_needed, self._backend, before))

    def checkpoint(self, job: TrainingJob) -> bytes | None:
        """What the job goes on from; None for one that begins. Raises StoreCorrupt unless it is whole."""
        return self._blobs.read(job.checkpoint) if job.checkpoint is not None else None

    def lines(self, job: TrainingJob) -> Iterator[Example]:
        """What the job trains on, and behind it what it is judged by. Raises what `examples` raises."""
        return from_jsonl(self._blobs.read(job.spec.data_digest))

    def examples(self, job: TrainingJob) -> list[Example]:
        """What the job trains on. Raises StoreCorrupt unless the stored bytes match the digest."""
        return list(self.lines(job))[: job.spec.examples]

    def validation_examples(self, job: TrainingJob) -> list[Example]:
        """What the job is judged by, if it came with any. Raises what `examples` raises."""
        return list(self.lines(job))[job.spec.examples :]


def _absent(asked: str) -> PrefixNotFound:
    return PrefixNotFound(f"there is no prefix {asked[:80]!r}", param="init_from")


def _length(source: PrefixVersion, asked: Any) -> int:
    if asked not in (None, source.virtual_tokens):
        what = f"a prefix that starts from {source.ref} has its {source.virtual_tokens} virtual tokens, not {asked}"
        raise InvalidRequest(f"{what}; leave the option out", param="virtual_tokens")
    return source.virtual_tokens


def _enqueue(
    made: TrainingJob,
    by: str,
    hold: str,
    also: Callable[[Transaction, TrainingJob], None] | None,
    transaction: Transaction,
) -> TrainingJob:
    holds.release(transaction, hold)
    job = dataclasses.replace(made, created_at=transaction.now)
    job_records.add(transaction, job)
    audit.record(transaction, by, job.tenant, "job.submit", job.id, job.spec.data_digest)
    if also is not None:
        also(transaction, job)
    return job


def _check_options(options: Mapping[str, Any], methods: Sequence[str]) -> None:
    for name in options:
        if name not in OPTIONS:
            raise InvalidRequest(f"unknown training option {name[:40]!r}", param=name[:40])
    for name, able in {"method": methods, "objective": TRAINABLE_OBJECTIVES}.items():
        if name in options and options[name] not in able:
            asked = str(options[name])[:40]
            raise InvalidRequest(f"{name} {asked!r} cannot be trained; what can: {', '.join(able)}", param=name)
    if "steps" in options and "epochs" in options:
        raise InvalidRequest("a run is as long as steps or epochs say; give one of them", param="epochs")
    method = options.get("method", TrainingSpec.method)
    for name, having in METHODS_WITH.items():
        if name in options and method in BUILT_IN_METHODS and method not in having:
            raise InvalidRequest(f"method {method} has no {name}; those that do: {', '.join(having)}", param=name)


def _spec(
    data_digest: str, examples: int, validation: int, options: Mapping[str, Any], source: Mapping[str, Any]
) -> TrainingSpec:
    defaults = DEFAULTS.get(options.get("method", TrainingSpec.method), {})
    chosen = {**source, **defaults, **options, "init_from": source["init_from"]}
    objective = Objective(options.get("objective", TrainingSpec.objective))
    unset = tuple(name for name in CHOSEN_BY_DATA if name not in chosen)
    fields = {**chosen, "objective": objective, "validation_examples": validation, "unset": unset}
    return TrainingSpec(data_digest, examples, **fields)


def _new_id() -> str:
    return "ftjob-" + "".join(secrets.choice(_ID_ALPHABET) for _ in range(24))
