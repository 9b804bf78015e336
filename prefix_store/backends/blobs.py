"""Blobs in a folder. Implements `backends.base.Blobs`, where the contracts stand."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from prefix_store.errors import StoreCorrupt, StoreUnavailable

_DIGEST = re.compile(r"[0-9a-f]{64}")
# What a writer leaves in the temporary folder is rubbish after this: none takes so long.
ABANDONED_SECONDS = 3600.0


class FolderBlobs:
    """`sha256/ab/<digest>` under `root`. Any number of threads and processes of one host may share a root."""

    def __init__(self, root: Path, clock: Callable[[], float] = time.time) -> None:
        self.root = root
        self._clock = clock
        self._blobs, self._temporary = root / "sha256", root / "tmp"
        with _storage():
            for folder in (root, self._blobs, self._temporary):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def put(self, data: bytes) -> str:
        """See `Blobs`."""
        digest = hashlib.sha256(data).hexdigest()
        with self.spool() as path:
            with _storage():
                path.write_bytes(data)
            self.put_file(path, digest)
        return digest

    @contextlib.contextmanager
    def spool(self) -> Iterator[Path]:
        """See `Blobs`."""
        path = self._temporary / uuid.uuid4().hex
        with _storage():
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        try:
            yield path
        finally:
            with _storage():
                path.unlink(missing_ok=True)

    def put_file(self, path: Path, digest: str) -> None:
        """See `Blobs`."""
        with _storage():
            _sync(path)
            self._place(path, self._path(digest))

    def read(self, digest: str) -> bytes:
        """See `Blobs`."""
        with _storage(), _present(digest):
            data = self._path(digest).read_bytes()
        check_digest(digest, hashlib.sha256(data).hexdigest())
        return data

    @contextlib.contextmanager
    def file(self, digest: str) -> Iterator[Path]:
        """See `Blobs`. It stays readable for whoever has opened it, even if it is removed."""
        path = self._path(digest)
        with _storage(), _present(digest), path.open("rb") as file:
            check_digest(digest, hashlib.file_digest(file, "sha256").hexdigest())
        try:
            yield path
        except FileNotFoundError:
            if path.exists():
                raise
            raise StoreCorrupt(f"blob {digest} is missing") from None  # removed before it was opened again

    def digests(self) -> Iterator[str]:
        """See `Blobs`."""
        with _storage():
            for path in self._blobs.glob("??/*"):
                if _DIGEST.fullmatch(path.name):
                    yield path.name

    def remove_unless(self, digest: str, needed: Callable[[], bool]) -> bool:
        """See `Blobs`. A put waits while this asks."""
        with _storage(), self._lock(fcntl.LOCK_EX):
            if needed():
                return False
            self._path(digest).unlink(missing_ok=True)
        return True

    def tidy(self) -> None:
        """See `Blobs`."""
        oldest = self._clock() - ABANDONED_SECONDS
        with _storage():
            for path in self._temporary.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if path.is_file() and path.stat().st_mtime < oldest:
                        path.unlink()

    def ping(self) -> None:
        """Raises StoreUnavailable unless the folder is there."""
        if not self._temporary.is_dir():
            raise StoreUnavailable("the blob folder cannot be reached")

    def close(self) -> None:
        """See `Blobs`."""

    def _path(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"not a sha256 in hex: {digest[:80]!r}")
        return self._blobs / digest[:2] / digest

    def _place(self, temporary: Path, path: Path) -> None:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        # replaced even when present: that heals a damaged blob
        with self._lock(fcntl.LOCK_SH):  # not while a collector looks whether it is needed
            os.replace(temporary, path)
        for folder in (path.parent, self._blobs):
            _sync(folder)

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
        where = f" ({error.filename})" if error.filename else ""
        raise StoreUnavailable(f"the blob folder cannot be used: {error.strerror}{where}") from error


@contextlib.contextmanager
def _present(digest: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise StoreCorrupt(f"blob {digest} is missing") from None


def check_digest(digest: str, actual: str) -> None:
    """Raises StoreCorrupt unless stored bytes still hash to their name."""
    if actual != digest:
        raise StoreCorrupt(f"blob {digest} is damaged: its bytes now hash to {actual}")


def _sync(path: Path) -> None:
    """A file's bytes, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
