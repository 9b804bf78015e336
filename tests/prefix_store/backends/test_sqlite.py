"""What is SQLite's own; the verbs are tested in test_base.py."""

import sqlite3
import threading

import pytest

from prefix_store.backends import sqlite_file
from prefix_store.backends.sqlite import SqliteBackend
from prefix_store.errors import StoreUnavailable


@pytest.fixture
def backend(tmp_path):
    opened = SqliteBackend(tmp_path / "store.db")
    yield opened
    opened.close()


def put(backend, key, value):
    backend.write(lambda transaction: transaction.put(key, value))


def test_files_are_for_their_owner_only(tmp_path):
    folder = tmp_path / "deep" / "store"
    backend = SqliteBackend(folder / "store.db")
    backend.ping()
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in folder.iterdir()}
    backend.close()
    assert oct(folder.stat().st_mode & 0o777) == "0o700"
    assert modes == dict.fromkeys(["store.db", "store.db-wal", "store.db-shm"], "0o600")


def test_commits_survive_the_power_going(backend):
    with backend._file.read() as connection:
        assert connection.execute("PRAGMA synchronous").fetchone()[0] == 2
        assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        assert connection.execute("PRAGMA busy_timeout").fetchone()[0] == 10_000


def test_a_newer_schema_is_refused(tmp_path):
    SqliteBackend(tmp_path / "store.db").close()
    with sqlite3.connect(tmp_path / "store.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StoreUnavailable, match="newer antefix: its schema is 99, this one knows 2"):
        SqliteBackend(tmp_path / "store.db")


def test_a_file_system_without_wal_is_refused(tmp_path, monkeypatch):
    connect = sqlite3.connect

    def without_shared_memory(address, **options):
        return connect(f"{address}&vfs=unix-none", **options)

    monkeypatch.setattr(sqlite3, "connect", without_shared_memory)
    with pytest.raises(StoreUnavailable, match="instead of 'wal'"):
        SqliteBackend(tmp_path / "store.db")


def test_what_is_no_database_is_refused(tmp_path):
    (tmp_path / "store.db").write_bytes(b"no database" * 100)
    with pytest.raises(StoreUnavailable, match="not a database"):
        SqliteBackend(tmp_path / "store.db")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(StoreUnavailable, match="cannot create"):
        SqliteBackend(tmp_path)


def test_a_file_removed_under_us_is_an_error(backend, tmp_path):
    for path in tmp_path.iterdir():
        path.unlink()
    # two transactions at once need a second connection
    with backend._file.read(), pytest.raises(StoreUnavailable, match="cannot open"):
        backend.ping()


def test_a_writer_that_waits_too_long_gives_up(tmp_path, monkeypatch):
    monkeypatch.setattr(sqlite_file, "BUSY_SECONDS", 0.05)
    backend = SqliteBackend(tmp_path / "store.db")
    other = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="locked"):
        put(backend, "a/1", 1)
    backend.ping()  # readers do not wait
    other.execute("ROLLBACK")
    other.close()
    put(backend, "a/1", 1)
    backend.close()


def test_connections_do_not_grow_with_threads(backend):
    for _ in range(5):
        thread = threading.Thread(target=backend.ping)
        thread.start()
        thread.join()
    assert len(backend._file._idle) == 1


def test_what_was_removed_leaves_no_byte_once_it_is_scrubbed(backend, tmp_path):
    marker = "m4rk3r" * 10
    for number in range(200):
        put(backend, f"a/{number}", marker)

    def remove(transaction):
        for number in range(200):
            transaction.delete(f"a/{number}")

    backend.write(remove)
    assert any(marker.encode() in path.read_bytes() for path in tmp_path.iterdir())
    backend.scrub()
    assert not any(marker.encode() in path.read_bytes() for path in tmp_path.iterdir())


def test_a_scrub_that_others_stand_in_the_way_of_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sqlite_file, "BUSY_SECONDS", 0.05)
    backend = SqliteBackend(tmp_path / "store.db")
    put(backend, "a/1", 1)
    reader = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM records").fetchone()
    with pytest.raises(StoreUnavailable, match=r"in use|locked"):
        backend.scrub()
    reader.execute("COMMIT")
    reader.close()
    backend.scrub()
    backend.close()


def test_another_programs_database_is_refused_and_left_as_it_was(tmp_path):
    path = tmp_path / "store.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE users (name TEXT)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StoreUnavailable, match="another program's database, with users"):
        SqliteBackend(path)
    assert path.read_bytes() == before
