"""What a store is made of: JSON records in the order of their keys, with transactions over them, and blobs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

# Where server, trainer and command line keep everything unless they are told otherwise.
DEFAULT_STORE = "sqlite:///.antefix/store.db"
# Records that are read at once where all of a folder are wanted, so that nobody else waits long.
PAGE = 1000
T = TypeVar("T")


class View(Protocol):
    """Reads records. Keys are ASCII and ordered by their bytes; values are JSON."""

    @property
    def now(self) -> float:
        """Seconds by the store's own clock, the same for all who share the store."""

    def get(self, key: str) -> Any:
        """The value, or None."""

    def get_many(self, keys: Sequence[str]) -> list[Any]:
        """The values in the order asked for, None where there is none."""

    def scan(
        self, prefix: str, *, after: str = "", limit: int | None = None, descending: bool = False
    ) -> list[tuple[str, Any]]:
        """The records whose key begins with `prefix`, which ends in `/`; the keys come back without it.

        `after` is such a shortened key: only what follows it, in the direction of the scan, is returned.
        """


class Transaction(View, Protocol):
    """Reads and writes. `get` sees this transaction's own writes, `scan` does not."""

    def put(self, key: str, value: Any) -> None:
        """Writes a record, new or not."""

    def delete(self, key: str) -> None:
        """Removes a record, present or not."""


class Backend(Protocol):
    """Where the records are kept. Safe to share between threads. Every verb raises StoreUnavailable."""

    def view(self) -> AbstractContextManager[View]:
        """For reading. Each read is of its own moment; what must be consistent is read in a transaction."""

    def write(self, work: Callable[[Transaction], T]) -> T:
        """Runs `work` and keeps all its writes durably, or none if it raises. Returns what `work` returns.

        As if no other transaction ran meanwhile; to that end `work` may be run more than once.
        """

    def ping(self) -> None:
        """Raises StoreUnavailable unless the store answers."""

    def examine(self) -> list[str]:
        """What in the database's own settings endangers what is kept. Raises StoreCorrupt if it is damaged."""

    def scrub(self) -> None:
        """Overwrites what was removed, where the database itself would leave its bytes in a file."""

    def close(self) -> None:
        """Lets go of connections."""


class Blobs(Protocol):
    """Bytes kept under their sha256. A blob is whole or absent, whenever the power goes. Safe to share."""

    def claim(self, store_id: str, records: Path | None) -> None:
        """Makes sure that only this store uses them; `records`: its file, if it is one. Raises StoreUnavailable."""

    def put(self, data: bytes) -> str:
        """Keeps the bytes durably and returns their digest. Raises StoreUnavailable, PayloadTooLarge."""

    def spool(self) -> AbstractContextManager[Path]:
        """A new file for what may become a blob, or not. Gone afterwards; if this process is killed, by `tidy`."""

    def put_file(self, path: Path, digest: str) -> None:
        """Keeps a file of `spool`, which is used up, under the digest it has. Raises what `put` raises."""

    def read(self, digest: str) -> bytes:
        """The blob's bytes. Raises StoreCorrupt unless they are there and match the digest."""

    def file(self, digest: str) -> AbstractContextManager[Path]:
        """The blob as a file to read, for what is too large to hold twice. Raises StoreCorrupt as `read` does."""

    def digests(self) -> Iterator[str]:
        """Every blob that is kept, whole or not."""

    def remove_unless(self, digest: str, needed: Callable[[], bool]) -> bool:
        """Removes a blob unless it is needed, as if nobody put it between the question and the removal."""

    def tidy(self) -> None:
        """Removes what writers that were killed left behind."""

    def ping(self) -> None:
        """Raises StoreUnavailable unless blobs can be reached."""

    def free_bytes(self) -> int | None:
        """Room on the disk under a folder of blobs; None where there is no folder. Raises StoreUnavailable."""

    def close(self) -> None:
        """Lets go of connections."""


class BufferedTransaction:
    """A transaction that holds its writes back, for the backend to make them all at once."""

    def __init__(self, view: View) -> None:
        self._view = view
        self.writes: dict[str, str | None] = {}

    @property
    def now(self) -> float:
        """See `View`."""
        return self._view.now

    def get(self, key: str) -> Any:
        """See `View`."""
        return self.get_many([key])[0]

    def get_many(self, keys: Sequence[str]) -> list[Any]:
        """See `View`."""
        unwritten = [key for key in keys if key not in self.writes]
        read = dict(zip(unwritten, self._view.get_many(unwritten), strict=True)) if unwritten else {}
        return [read[key] if key in read else from_json(self.writes[key]) for key in keys]

    def scan(
        self, prefix: str, *, after: str = "", limit: int | None = None, descending: bool = False
    ) -> list[tuple[str, Any]]:
        """See `View`."""
        return self._view.scan(prefix, after=after, limit=limit, descending=descending)

    def put(self, key: str, value: Any) -> None:
        """See `Transaction`."""
        self.writes[key] = to_json(value)

    def delete(self, key: str) -> None:
        """See `Transaction`."""
        self.writes[key] = None


def walk(backend: Backend, folder: str, after: str = "") -> Iterator[tuple[str, Any]]:
    """Every record of a folder, as `scan` gives them, a page at a time. Of what changes meanwhile, some is missed."""
    while True:
        with backend.view() as view:
            page = view.scan(folder, after=after, limit=PAGE)
        yield from page
        if len(page) < PAGE:
            return
        after = page[-1][0]


def bounds(prefix: str, after: str, descending: bool) -> tuple[str, str]:
    """The keys, both exclusive, between which a scan looks. `/` is followed by `0` in ASCII."""
    end = prefix[:-1] + "0"
    if descending:
        return prefix, prefix + after if after else end
    return prefix + after, end


def to_json(value: Any) -> str:
    """A record's value as it is kept: in ASCII, for half a surrogate pair has no bytes of its own."""
    return json.dumps(value, separators=(",", ":"))


def from_json(text: str | None) -> Any:
    """The value behind `to_json`'s text; None for an absent record."""
    return None if text is None else json.loads(text)
