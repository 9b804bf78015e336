"""Bytes kept under their sha256 in a folder. A blob is whole or absent, whenever the power goes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from prefix_store.errors import StoreCorrupt, StoreUnavailable

_DIGEST = re.compile(r"[0-9a-f]{64}")
_CHUNK = 1 << 20


class Blobs:
    """`sha256/ab/<digest>` under `root`. Any number of threads and processes of one host may share a root."""

    def __init__(self, root: Path, clock: Callable[[], float] = time.time) -> None:
        self.root = root
        self._clock = clock
        self._blobs, self._temporary = root / "sha256", root / "tmp"
        with _storage():
            for folder in (root, self._blobs, self._temporary):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def put(self, data: bytes) -> str:
        """Keeps the bytes durably and returns their digest."""
        return self._put([data])

    def path(self, digest: str) -> Path:
        """Where the blob is, if it is kept; its content is not checked."""
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"not a sha256 in hex: {digest[:80]!r}")
        return self._blobs / digest[:2] / digest

    def read(self, digest: str) -> bytes:
        """The blob's bytes. Raises StoreCorrupt unless they are there and match the digest."""
        with _storage(), _present(digest):
            data = self.path(digest).read_bytes()
        _check(digest, hashlib.sha256(data).hexdigest())
        return data

    def verify(self, digest: str) -> Path:
        """The blob's path, for what is too large to hold twice. Raises StoreCorrupt as `read` does."""
        path = self.path(digest)
        with _storage(), _present(digest), path.open("rb") as file:
            _check(digest, hashlib.file_digest(file, "sha256").hexdigest())
        return path

    def collect(self, keep: set[str], older_than_seconds: float) -> int:
        """Removes blobs not in `keep` and what writers left behind, both only when old; returns how many.

        The age protects a blob whose record is about to be written.
        """
        oldest = self._clock() - older_than_seconds
        with _storage():
            found = [*self._blobs.glob("??/*"), *self._temporary.iterdir()]
            return sum(self._remove_if_old(path, oldest) for path in found if path.name not in keep)

    def ping(self) -> None:
        """Raises StoreUnavailable unless the folder is there."""
        if not self._temporary.is_dir():
            raise StoreUnavailable("the blob folder cannot be reached")

    def _put(self, chunks: Iterable[bytes]) -> str:
        temporary = self._temporary / uuid.uuid4().hex
        with _storage():
            try:
                digest = _write(temporary, chunks)
                self._place(temporary, self.path(digest))
            finally:
                temporary.unlink(missing_ok=True)
        return digest

    def _place(self, temporary: Path, path: Path) -> None:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        # replaced even when present: that heals a damaged blob and makes an old one young again
        with self._lock(fcntl.LOCK_SH):
            os.replace(temporary, path)
        for folder in (path.parent, self._blobs):
            _sync(folder)

    def _remove_if_old(self, path: Path, oldest: float) -> bool:
        # without the lock a writer could replace the file between the look at its age and its removal
        with self._lock(fcntl.LOCK_EX), contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < oldest:
                path.unlink()
                return True
        return False

    @contextlib.contextmanager
    def _lock(self, kind: int) -> Iterator[None]:
        with (self.root / "lock").open("ab") as file:
            fcntl.flock(file, kind)
            yield


@contextlib.contextmanager
def _storage() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreUnavailable(f"the blob folder cannot be used: {error.strerror}") from error


@contextlib.contextmanager
def _present(digest: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise StoreCorrupt(f"blob {digest} is missing") from None


def _check(digest: str, actual: str) -> None:
    if actual != digest:
        raise StoreCorrupt(f"blob {digest} is damaged: its bytes now hash to {actual}")


def _write(path: Path, chunks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        for chunk in chunks:
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
