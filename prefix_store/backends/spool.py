"""A folder of files on their way: each has a lock that its writer holds, so that what a killed one left is known."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from prefix_store.errors import StoreUnavailable


class Spool:
    """Any number of threads and processes of one host may share the folder. The kernel unlocks what the dead held.

    A file lies in a folder of its own, beside the lock: whoever writes it may put another file in its place.
    """

    def __init__(self, folder: Path) -> None:
        """Raises StoreUnavailable unless the folder can be made, or if it is another user's."""
        self._folder = folder
        with storage():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.stat().st_uid != os.geteuid():
                raise StoreUnavailable(f"{folder} belongs to another user; set TMPDIR to a folder of your own")

    @contextlib.contextmanager
    def file(self) -> Iterator[Path]:
        """A new, empty file, which only this user can read."""
        with storage():
            folder, lock = self._create()
            os.close(os.open(folder / "file", os.O_CREAT | os.O_EXCL, 0o600))
        try:
            yield folder / "file"
        finally:
            with storage():
                shutil.rmtree(folder)
                os.close(lock)

    def tidy(self) -> None:
        """Removes the files whose writers are gone."""
        with storage():
            for path in self._folder.iterdir():
                if path.is_dir():
                    _remove_unlocked(path)
                else:
                    path.unlink(missing_ok=True)

    def ping(self) -> None:
        """Raises StoreUnavailable unless the folder is there, and can be written as far as its rights say."""
        with storage():
            os.scandir(self._folder).close()
        if not os.access(self._folder, os.W_OK | os.X_OK):
            raise StoreUnavailable(f"the blob folder cannot be used: {self._folder} cannot be written")

    def _create(self) -> tuple[Path, int]:
        """A folder and the lock in it; again where someone tidied before the lock was held."""
        while True:
            folder = self._folder / uuid.uuid4().hex
            folder.mkdir(mode=0o700)
            with contextlib.suppress(FileNotFoundError):
                lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
                fcntl.flock(lock, fcntl.LOCK_EX)
                if (folder / "lock").exists():
                    return folder, lock
                os.close(lock)


@contextlib.contextmanager
def storage() -> Iterator[None]:
    """Turns what a disk fails with into StoreUnavailable."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise StoreUnavailable(f"the blob folder cannot be used: {error.strerror}{where}") from error


def _remove_unlocked(folder: Path) -> None:
    """Leaves alone what a writer holds, and what is no writer's."""
    try:
        lock = os.open(folder / "lock", os.O_RDWR)
    except FileNotFoundError:
        # its writer was killed before there was a lock, or is about to make it and begins anew
        with contextlib.suppress(OSError):
            folder.rmdir()
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass  # somebody writes it
    finally:
        os.close(lock)
