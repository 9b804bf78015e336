"""Blobs in a folder. Implements `backends.base.Blobs`, where the contracts stand."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from prefix_store.backends.spool import Spool, storage
from prefix_store.errors import StoreCorrupt, StoreUnavailable

_DIGEST = re.compile(r"[0-9a-f]{64}")


class FolderBlobs:
    """`sha256/ab/<digest>` under `root`. Any number of threads and processes of one host may share a root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._blobs = root / "sha256"
        with storage():
            for folder in (root, self._blobs):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._spool = Spool(root / "tmp")

    def claim(self, store_id: str, records: Path | None) -> None:
        """See `Blobs`. The folder's file `owner` says whose it is; a folder without one is taken."""
        owner = self.root / "owner"
        with storage(), self._lock(fcntl.LOCK_EX):
            held = json.loads(owner.read_text()) if owner.exists() else None
            folder = self.root.stat().st_ino  # a copy of the folder has another
            if held is not None:
                _check_owner(held, store_id, records, self.root, copied=held["folder"] != folder)
            mine = {"store": store_id, "records": str(records) if records is not None else None, "folder": folder}
            if held != mine:
                with self._spool.file() as path:
                    path.write_text(json.dumps(mine))
                    _sync(path)
                    os.replace(path, owner)
                _sync(self.root)

    def put(self, data: bytes) -> str:
        """See `Blobs`."""
        digest = hashlib.sha256(data).hexdigest()
        with self.spool() as path:
            with storage():
                path.write_bytes(data)
            self.put_file(path, digest)
        return digest

    def spool(self) -> AbstractContextManager[Path]:
        """See `Blobs`."""
        return self._spool.file()

    def put_file(self, path: Path, digest: str) -> None:
        """See `Blobs`."""
        with storage():
            _sync(path)
            self._place(path, self._path(digest))

    def read(self, digest: str) -> bytes:
        """See `Blobs`."""
        with storage(), self._present(digest):
            data = self._path(digest).read_bytes()
        check_digest(digest, hashlib.sha256(data).hexdigest())
        return data

    @contextlib.contextmanager
    def file(self, digest: str) -> Iterator[Path]:
        """See `Blobs`. It stays readable for whoever has opened it, even if it is removed."""
        path = self._path(digest)
        with storage(), self._present(digest), path.open("rb") as file:
            check_digest(digest, hashlib.file_digest(file, "sha256").hexdigest())
        try:
            yield path
        except FileNotFoundError:
            if path.exists():
                raise
            with storage(), self._present(digest):  # removed before it was opened again
                raise

    def digests(self) -> Iterator[str]:
        """See `Blobs`."""
        with storage():
            os.scandir(self._blobs).close()  # a folder that is away is not an empty one
            for path in self._blobs.glob("??/*"):
                if _DIGEST.fullmatch(path.name):
                    yield path.name

    def remove_unless(self, digest: str, needed: Callable[[], bool]) -> bool:
        """See `Blobs`. A put waits while this asks."""
        with storage(), self._lock(fcntl.LOCK_EX):
            if needed():
                return False
            self._path(digest).unlink(missing_ok=True)
        return True

    def tidy(self) -> None:
        """See `Blobs`."""
        self._spool.tidy()

    def ping(self) -> None:
        """See `Blobs`."""
        self._spool.ping()
        with storage():
            os.scandir(self._blobs).close()

    def free_bytes(self) -> int | None:
        """See `Blobs`."""
        with storage():
            return shutil.disk_usage(self.root).free

    def close(self) -> None:
        """See `Blobs`."""

    @contextlib.contextmanager
    def _present(self, digest: str) -> Iterator[None]:
        """Raises StoreCorrupt for a missing file, unless the whole folder is away, as a disk may be for a time."""
        try:
            yield
        except FileNotFoundError:
            if not self._blobs.is_dir():
                raise
            raise StoreCorrupt(f"blob {digest} is missing") from None

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


def _check_owner(held: dict[str, Any], store_id: str, records: Path | None, root: Path, *, copied: bool) -> None:
    """Raises StoreUnavailable for another store, also for a copy of a file that is still there itself."""
    if held["store"] != store_id:
        raise StoreUnavailable(
            f"the blob folder {root} is another store's ({held['records'] or 'in Redis'}), and each would remove the "
            "other's files; set ANTEFIX_BLOBS to a folder of its own, or remove this one if that store is gone"
        )
    first = Path(held["records"]) if held["records"] is not None else None
    if not copied and first is not None and records is not None and first.exists() and not first.samefile(records):
        raise StoreUnavailable(
            f"{records} is a copy of {first}, whose blob folder is {root}, and each would remove the other's files; "
            "copy the folder as well and set ANTEFIX_BLOBS to the copy, or use `antefix store migrate`"
        )


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
