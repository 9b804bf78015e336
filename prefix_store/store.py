"""The store: prefixes, jobs and keys, wherever they are kept. The only place where server and trainer meet."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from prefix_store import codec
from prefix_store.backends.base import Backend
from prefix_store.backends.blobs import Blobs
from prefix_store.backends.sqlite import SqliteBackend
from prefix_store.errors import PrefixNotFound, StoreUnavailable
from prefix_store.job_store import JobStore
from prefix_store.jobs import TrainingJob
from prefix_store.key_store import KeyStore
from prefix_store.prefix import PrefixManifest, PrefixRef, PrefixVersion, check_name
from prefix_store.tensors import PrefixTensors

# A blob is written before the record that names it: younger ones may still be on their way to being named.
COLLECT_AFTER_SECONDS = 3600.0


class PrefixStore:
    """Versions of prefixes. A version, once saved, never changes."""

    def __init__(self, backend: Backend, blobs: Blobs) -> None:
        self._backend = backend
        self._blobs = blobs

    def save(
        self,
        tenant: str,
        name: str,
        manifest: PrefixManifest,
        tensors: PrefixTensors,
        *,
        job: TrainingJob | None = None,
    ) -> PrefixVersion:
        """Adds the next version of `tenant/name` and makes it current; with a job, once and only while it is owned.

        Raises InvalidName, InvalidPrefix and, with a job, LeaseLost.
        """
        check_name(tenant, "tenant")
        check_name(name)
        data = codec.encode(manifest, tensors)
        digest = self._blobs.put(data)
        return self._backend.publish(tenant, name, manifest, digest, len(data), job)

    def resolve(self, ref: PrefixRef) -> PrefixVersion:
        """The version that a reference means now. Raises PrefixNotFound."""
        # no alias can have been set yet
        found = self._backend.version(ref.tenant, ref.name, ref.version) if ref.alias is None else None
        if found is None:
            raise _not_found(ref)
        return found

    def read(self, version: PrefixVersion) -> tuple[PrefixManifest, PrefixTensors]:
        """The prefix itself. Raises StoreCorrupt unless the stored bytes match the digest."""
        return codec.decode(self._blobs.verify(version.digest))

    def path(self, version: PrefixVersion) -> Path:
        """Where the native file is; its content is not checked."""
        return self._blobs.path(version.digest)

    def page(self, tenant: str, after: str = "", limit: int = 100) -> list[PrefixVersion]:
        """Current versions of the tenant's names greater than `after`, in name order."""
        return self._backend.current_versions(tenant, after, limit)

    def delete(self, ref: PrefixRef) -> list[PrefixVersion]:
        """Removes one version, or all of a bare name, and returns them. Raises PrefixNotFound."""
        removed = self._backend.delete(ref.tenant, ref.name, ref.version) if ref.alias is None else []
        if not removed:
            raise _not_found(ref)
        return removed

    def ever_published(self, tenant: str, name: str) -> bool:
        """Whether the name was ever used, deleted or not."""
        return self._backend.ever_published(tenant, name)


class Store:
    """Everything that is kept. Safe to share between threads."""

    def __init__(self, backend: Backend, blobs: Blobs, clock: Callable[[], float] = time.time) -> None:
        self._backend = backend
        self._blobs = blobs
        self.prefixes = PrefixStore(backend, blobs)
        self.jobs = JobStore(backend, blobs)
        self.keys = KeyStore(backend, clock)

    @classmethod
    def open(cls, url: str, blobs: str | None = None, clock: Callable[[], float] = time.time) -> Store:
        """Opens or creates a store, readable by its owner only. Raises StoreUnavailable, with what is supported.

        `url`: `sqlite:///relative` or `sqlite:////absolute`. `blobs`: `file:///folder`, by default the folder
        `blobs` beside the SQLite file.
        """
        path = Path(_after("sqlite:///", url, "store"))
        folder = Path("/", _after("file:///", blobs, "blobs")) if blobs is not None else path.parent / "blobs"
        backend = SqliteBackend(path, clock)
        return cls(backend, Blobs(folder.absolute(), clock), clock)

    def ping(self) -> None:
        """Raises StoreUnavailable unless records and blobs can be reached."""
        self._backend.ping()
        self._blobs.ping()

    def collect(self) -> int:
        """Removes old blobs that no record names and returns how many. Safe while others read and write."""
        return self._blobs.collect(self._backend.digests(), COLLECT_AFTER_SECONDS)

    def close(self) -> None:
        """Lets go of files and connections."""
        self._backend.close()


def _after(scheme: str, url: str, what: str) -> str:
    rest = url.removeprefix(scheme)
    if rest == url or not rest.strip("/"):
        # the rest of the address may hold a password
        raise StoreUnavailable(f"{what} address: expected {scheme}path, got {url.partition('://')[0][:20]}://…")
    return rest


def _not_found(ref: PrefixRef) -> PrefixNotFound:
    return PrefixNotFound(f"no prefix {ref}", param="prefix_id")
