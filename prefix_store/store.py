"""The store: prefixes, files, jobs, tenants and keys, wherever kept. The only place where server and trainer meet."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from prefix_store import collection, identity
from prefix_store.answers import Answers
from prefix_store.audit import AuditLog
from prefix_store.backends.base import Backend, Blobs
from prefix_store.backends.blobs import FolderBlobs
from prefix_store.backends.sqlite import SqliteBackend
from prefix_store.errors import StoreUnavailable
from prefix_store.files import FileStore
from prefix_store.job_store import JobStore
from prefix_store.key_store import KeyStore
from prefix_store.prefixes import PrefixStore
from prefix_store.tenant_store import TenantStore

REDIS_SCHEMES = ("redis://", "rediss://", "unix://")


class Store:
    """Everything that is kept. Safe to share between threads."""

    def __init__(self, backend: Backend, blobs: Blobs) -> None:
        self.backend = backend
        self.blobs = blobs
        self.prefixes = PrefixStore(backend, blobs)
        self.jobs = JobStore(backend, blobs)
        self.files = FileStore(backend, blobs)
        self.tenants = TenantStore(backend)
        self.keys = KeyStore(backend)
        self.audit = AuditLog(backend)
        self.answers = Answers(backend)

    @classmethod
    def open(
        cls,
        url: str,
        blobs: str | None = None,
        clock: Callable[[], float] | None = None,
        *,
        create: bool = True,
        unfinished: bool = False,
    ) -> Store:
        """Opens a store, or creates it unless there must be one. Raises StoreUnavailable, with what is supported.

        `url`: `sqlite:///relative` or `sqlite:////absolute`, readable by its owner only, or `redis://host:port/0`,
        which Valkey answers too. `blobs`: `file:///folder`, or `redis` to keep them in the same server; by default the
        folder `blobs` beside the SQLite file, or `redis`. `clock` replaces the store's own. `unfinished`: also what
        is the copy of another store, cut off half-way.
        """
        path = None
        if url.startswith(REDIS_SCHEMES):
            backend = _redis(url, clock)
        else:
            path = Path(_after("sqlite:///", url, "store", f"sqlite:///path or {REDIS_SCHEMES[0]}host:port/0"))
            if not create and not path.is_file():
                raise StoreUnavailable(f"there is no store at {path}; ANTEFIX_STORE says where it is")
            backend = SqliteBackend(path, clock or time.time)  # makes the folder, for its owner only
        try:
            if identity.is_unfinished(backend) and not unfinished:
                raise StoreUnavailable("this store is a copy that was cut off; do `antefix store migrate` again")
            kept = _blobs(blobs, url, path)
            kept.claim(identity.store_id(backend), path.absolute() if path is not None else None)
        except BaseException:
            backend.close()
            raise
        return cls(backend, kept)

    def ping(self) -> None:
        """Raises StoreUnavailable unless records and blobs can be reached."""
        self.backend.ping()
        self.blobs.ping()

    def collect(self) -> int:
        """Removes expired versions and blobs that no record names; returns how many blobs. Safe while others work."""
        return collection.collect(self.backend, self.blobs)

    def erase_tenant(self, name: str) -> int:
        """Removes all that a tenant has, to the last byte, and returns how many records that were."""
        erased = self.tenants.erase(name)
        self.collect()
        self.backend.scrub()
        return erased

    def close(self) -> None:
        """Lets go of files and connections."""
        self.backend.close()
        self.blobs.close()


def _redis(url: str, clock: Callable[[], float] | None) -> Backend:
    from prefix_store.backends.redis import RedisBackend  # only where it is used: its package takes 0.2 s to import

    return RedisBackend(url, clock)


def _blobs(where: str | None, store: str, path: Path | None) -> Blobs:
    if where is None and path is not None:
        return FolderBlobs((path.parent / "blobs").absolute())
    if where is not None and where != "redis":
        expected = "file:///folder" + (" or redis" if path is None else "")
        return FolderBlobs(Path("/", _after("file:///", where, "blobs", expected)))
    if path is not None:
        raise StoreUnavailable("blobs address: redis keeps blobs in the store's own Redis, and the store is not one")
    from prefix_store.backends.redis_blobs import RedisBlobs

    return RedisBlobs(store)


def _after(scheme: str, url: str, what: str, expected: str) -> str:
    rest = url.removeprefix(scheme)
    if rest == url or not rest.strip("/"):
        # the rest of the address may hold a password
        raise StoreUnavailable(f"{what} address: expected {expected}, got {url.partition('://')[0][:20]}://…")
    return rest
