"""What is left of a run once it is trained: samples of what it learnt, and its prefix in the store."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prefix_store.errors import StoreUnavailable
from prefix_store.jobs import TrainingJob
from prefix_store.model.frozen import FrozenModel
from prefix_store.prefix import PrefixManifest, PrefixVersion
from prefix_store.store import Store
from prefix_store.tensors import PrefixTensors
from trainer import samples
from trainer.data import Example

RETRY_SECONDS = 5.0  # between two tries of a store that could not be written


class Publication:
    """Makes the samples in slices, then saves the prefix, again and again while the store cannot take it."""

    def __init__(
        self,
        store: Store,
        frozen: FrozenModel,
        manifest: PrefixManifest,
        tensors: PrefixTensors,
        examples: Sequence[Example],
        tell: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self._store, self._manifest, self._tensors, self._tell, self._clock = store, manifest, tensors, tell, clock
        self._making = samples.making(frozen, manifest, tensors, examples)
        self.samples: list[dict[str, str]] | None = None  # once they are made
        self._again: float | None = None  # when the store is next tried, once it has failed

    @property
    def waits(self) -> bool:
        """Whether there is nothing to do before the store is tried again."""
        return self._again is not None and self._clock() < self._again

    def show(self, until: float) -> bool:
        """Goes on with the samples until a time, and at least by a slice; True once they are made."""
        try:
            next(self._making)
            while self._clock() < until:
                next(self._making)
        except StopIteration as end:
            self.samples = end.value
        return self.samples is not None

    def save(self, job: TrainingJob) -> PrefixVersion | None:
        """Saves the prefix as the next version of its name; None while the store cannot take it.

        The first time it tells why. Raises LeaseLost and QuotaExceeded.
        """
        by = f"worker {job.worker}"
        try:
            return self._store.prefixes.save(job.tenant, job.name, self._manifest, self._tensors, job=job, by=by)
        except StoreUnavailable as error:
            is_first = self._again is None
            self._again = self._clock() + RETRY_SECONDS
            if is_first:
                self._tell(f"trained, and waiting for the store to take its prefix: {error.message}")
        return None
