"""What a job's prefix starts from: its examples, its long text, or another prefix that the tenant may use."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from prefix_store import job_start
from prefix_store.jobs import TrainingJob
from prefix_store.model import prompt
from prefix_store.model.frozen import FrozenModel
from prefix_store.prefix import PrefixRef
from prefix_store.store import Store
from prefix_store.tensors import PrefixTensors
from trainer.data import Example
from trainer.methods.start import Start


def start(store: Store, job: TrainingJob, frozen: FrozenModel, examples: Sequence[Example]) -> Start:
    """What the job's method is to be given.

    Raises PrefixNotFound and PrefixMismatch for an `init_from` that is gone or that does not fit model and job.
    """
    if job.spec.init_from is not None:
        return _stored(store, job, frozen)
    if job.spec.context is not None:
        return prompt.encode(frozen.tokenizer, job.spec.context)
    return chain.from_iterable(example.source or example.ids for example in examples)


def _stored(store: Store, job: TrainingJob, frozen: FrozenModel) -> PrefixTensors:
    spec = job.spec
    assert spec.init_from is not None
    version = store.prefixes.resolve(PrefixRef.parse(spec.init_from, job.tenant), reader=job.tenant)
    manifest, tensors = store.prefixes.read(version)
    job_start.check(spec, manifest, frozen.check_fits)
    return tensors
