"""One SQLite file: its connections, its transactions and the version of its schema."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefix_store.backends import schema1
from prefix_store.errors import StoreUnavailable

BUSY_SECONDS = 10.0
SCHEMA_VERSION = 2
SCHEMA = "CREATE TABLE records (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID"


class SqliteFile:
    """Lends a connection to one thread at a time. Any number of threads and processes of one host may share a file."""

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self._idle: list[sqlite3.Connection] = []
        self._closed = False
        _create(self._path)
        self._check_ours()
        self._check_journal()
        self._upgrade()

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A connection for single SELECTs. Every sqlite3 error leaves as StoreUnavailable."""
        connection = self._take()
        try:
            yield connection
        except sqlite3.Error as error:
            connection.close()  # after a failure of the file a connection may be in any state
            raise StoreUnavailable(f"the store cannot be used: {error}") from error
        except BaseException:
            self._give_back(connection)
            raise
        self._give_back(connection)

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A transaction, committed durably unless the block raises."""
        with self.read() as connection:
            # a transaction that reads first and writes later is refused under load however long it would wait
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

    def scrub(self) -> None:
        """Writes the file anew without what was removed, and empties the write-ahead log."""
        with self.read() as connection:
            connection.execute("VACUUM")
            (busy, _, _) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise StoreUnavailable("the store is in use, so its log keeps what was removed; try again")

    def close(self) -> None:
        """Closes the connections that nobody holds; the others close as they come back."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()

    def _take(self) -> sqlite3.Connection:
        if self._closed:
            raise StoreUnavailable("the store is closed")
        try:
            return self._idle.pop()
        except IndexError:
            return self._connect()

    def _give_back(self, connection: sqlite3.Connection) -> None:
        if self._closed:
            connection.close()
        else:
            self._idle.append(connection)

    def _connect(self) -> sqlite3.Connection:
        try:
            # mode=rw: a file that was removed under us is an error, not a new empty store
            connection = sqlite3.connect(
                f"{self._path.as_uri()}?mode=rw",
                uri=True,
                timeout=BUSY_SECONDS,
                isolation_level=None,
                check_same_thread=False,
            )
            connection.row_factory = sqlite3.Row
            # FULL: what a user was told is stored survives the power going; NORMAL would only keep the file sound
            connection.execute("PRAGMA synchronous = FULL")
        except sqlite3.Error as error:
            raise StoreUnavailable(f"cannot open the store at {self._path}: {error}") from error
        return connection

    def _check_journal(self) -> None:
        with self.read() as connection:
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise StoreUnavailable(
                f"{self._path} cannot hold a store: SQLite answers journal mode {mode!r} instead of 'wal', "
                "as it does on network file systems; use a local disk"
            )

    def _check_ours(self) -> None:
        """Raises StoreUnavailable for another program's database, of which nothing is changed."""
        with self.read() as connection:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master LIMIT 3")]
        if version == 0 and tables:
            raise StoreUnavailable(f"{self._path} is no store but another program's database, with {', '.join(tables)}")

    def _upgrade(self) -> None:
        with self.write() as connection:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version > SCHEMA_VERSION:
                raise StoreUnavailable(
                    f"{self._path} was written by a newer antefix: its schema is {version}, "
                    f"this one knows {SCHEMA_VERSION}"
                )
            if version < SCHEMA_VERSION:
                connection.execute(SCHEMA)
                if version == 1:
                    schema1.convert(connection)
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _create(path: Path) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise StoreUnavailable(f"cannot create the store at {path}: {error}") from error
