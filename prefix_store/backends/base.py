"""The verbs of a record backend. Each is atomic; all times are the store's own clock, in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from prefix_store.jobs import Heartbeat, JobError, JobEvent, JobStatus, TrainingJob, TrainingSpec
from prefix_store.prefix import PrefixManifest, PrefixVersion
from prefix_store.tenants import ApiKey

# Where server, trainer and command line keep everything unless they are told otherwise.
DEFAULT_STORE = "sqlite:///.antefix/store.db"


class Backend(Protocol):
    """Where the records are kept. Blobs are elsewhere and always written before the record that names them."""

    def publish(
        self, tenant: str, name: str, manifest: PrefixManifest, digest: str, size_bytes: int, job: TrainingJob | None
    ) -> PrefixVersion:
        """Adds the next version of `tenant/name` and makes it current.

        With a job: refused with LeaseLost unless the job is running under `job.fence`, marks the job succeeded in the
        same transaction, and returns the version already published when the job was published before.
        """

    def version(self, tenant: str, name: str, version: int | None) -> PrefixVersion | None:
        """That version, or the current one for None; None if there is none."""

    def current_versions(self, tenant: str, after: str, limit: int) -> list[PrefixVersion]:
        """Current versions of names greater than `after`, in name order."""

    def ever_published(self, tenant: str, name: str) -> bool:
        """Whether the name was ever used, deleted or not."""

    def delete(self, tenant: str, name: str, version: int | None) -> list[PrefixVersion]:
        """Removes one version, or all for None, and returns what was removed. Version numbers are never used again.

        When the current version goes, the highest remaining one becomes current.
        """

    def digests(self) -> set[str]:
        """Every digest that a record names: prefix blobs and training data."""

    def enqueue(self, job_id: str, tenant: str, name: str, spec: TrainingSpec) -> TrainingJob:
        """Adds a queued job."""

    def claim(self, worker: str, lease_seconds: float) -> TrainingJob | None:
        """Takes the next job: queued, or running with a lapsed lease; least busy tenant first, then age.

        Raises attempt and fence. A job whose lease has lapsed is not taken but cancelled if that was requested, or
        failed with code `worker_lost` if its attempts are used up.
        """

    def heartbeat(self, job: TrainingJob, lease_seconds: float, progress: dict[str, Any]) -> Heartbeat:
        """Extends the lease and records progress. Raises LeaseLost."""

    def finish(self, job: TrainingJob, status: JobStatus, error: JobError | None) -> TrainingJob:
        """Ends a running job, or hands it back with status queued. Raises LeaseLost, Conflict for an illegal status.

        A job that is handed back gets its attempt back; if its cancelling was requested, it is cancelled instead.
        """

    def request_cancel(self, tenant: str, job_id: str) -> TrainingJob:
        """A queued job is cancelled at once, a running one is flagged. Raises JobNotFound, Conflict when final."""

    def job(self, tenant: str, job_id: str) -> TrainingJob | None:
        """The job, or None."""

    def jobs(self, tenant: str, after: str | None, limit: int) -> list[TrainingJob]:
        """Newest first; `after` is the last job id of the page before."""

    def job_counts(self) -> dict[JobStatus, int]:
        """How many jobs stand in each state, over all tenants."""

    def add_event(self, job: TrainingJob, kind: str, data: dict[str, Any]) -> None:
        """Appends to the job's history. Raises LeaseLost."""

    def events(self, tenant: str, job_id: str, after: int, limit: int) -> list[JobEvent]:
        """Events with a sequence above `after`, oldest first."""

    def add_key(self, key: ApiKey) -> None:
        """Stores a key."""

    def key(self, key_id: str) -> ApiKey | None:
        """The key with this public id, or None."""

    def keys(self) -> Sequence[ApiKey]:
        """Every key, oldest first."""

    def remove_key(self, key_id: str) -> bool:
        """Whether there was one."""

    def ping(self) -> None:
        """Raises StoreUnavailable unless the store answers."""

    def close(self) -> None:
        """Lets go of connections."""
