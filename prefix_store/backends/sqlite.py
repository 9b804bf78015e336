"""The embedded backend: all records in one table of one SQLite file."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefix_store.backends.base import BufferedTransaction, T, Transaction, View, bounds, from_json
from prefix_store.backends.sqlite_file import SqliteFile
from prefix_store.errors import StoreCorrupt

UPSERT = "INSERT INTO records (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value"


class SqliteBackend:
    """Implements `backends.base.Backend`, where the contracts stand. Every process of one host may share the file."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._file = SqliteFile(path)
        self._clock = clock

    @contextmanager
    def view(self) -> Iterator[View]:
        """See `Backend`."""
        with self._file.read() as db:
            yield _SqliteView(db, self._clock())

    def write(self, work: Callable[[Transaction], T]) -> T:
        """See `Backend`. Writers wait for one another, so that `work` runs once."""
        with self._file.write() as db:
            transaction = BufferedTransaction(_SqliteView(db, self._clock()))
            result = work(transaction)
            for key, value in transaction.writes.items():
                if value is None:
                    db.execute("DELETE FROM records WHERE key = ?", (key,))
                else:
                    db.execute(UPSERT, (key, value))
        return result

    def ping(self) -> None:
        """See `Backend`."""
        with self._file.read() as db:
            db.execute("SELECT 1 FROM records LIMIT 1").fetchone()

    def examine(self) -> list[str]:
        """See `Backend`."""
        with self._file.read() as db:
            found = [row[0] for row in db.execute("PRAGMA quick_check")]
        if found != ["ok"]:
            raise StoreCorrupt(f"the SQLite file is damaged: {found[0][:200]}")
        return []

    def scrub(self) -> None:
        """Overwrites what was removed from the file, so that no byte of it remains."""
        self._file.scrub()

    def close(self) -> None:
        """See `Backend`."""
        self._file.close()


class _SqliteView:
    def __init__(self, db: sqlite3.Connection, now: float) -> None:
        self._db = db
        self.now = now

    def get(self, key: str) -> Any:
        row = self._db.execute("SELECT value FROM records WHERE key = ?", (key,)).fetchone()
        return from_json(row[0]) if row is not None else None

    def get_many(self, keys: Sequence[str]) -> list[Any]:
        return [self.get(key) for key in keys]

    def scan(
        self, prefix: str, *, after: str = "", limit: int | None = None, descending: bool = False
    ) -> list[tuple[str, Any]]:
        low, high = bounds(prefix, after, descending)
        rows = self._db.execute(
            f"SELECT key, value FROM records WHERE key > ? AND key < ? ORDER BY key {'DESC' if descending else 'ASC'}"
            " LIMIT ?",
            (low, high, -1 if limit is None else limit),
        )
        return [(key[len(prefix) :], from_json(value)) for key, value in rows]
