"""Files that may become blobs, in a folder and in Redis."""

import fcntl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefix_store.backends.base import Blobs
from prefix_store.backends.blobs import FolderBlobs
from prefix_store.backends.redis_blobs import CHUNK_BYTES, RedisBlobs
from prefix_store.backends.spool import Spool
from prefix_store.codec import digest_of
from prefix_store.errors import StoreUnavailable
from tests import redis_server


@pytest.fixture(params=["folder", "redis"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Blobs]:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    if request.param == "folder":
        yield FolderBlobs(tmp_path / "blobs")
    elif redis_server.program("redis") is None:
        pytest.skip("no redis-server for this machine")
    else:
        with redis_server.running("redis", tmp_path) as server:
            made = RedisBlobs(server.url)
            yield made
            made.close()


@pytest.mark.parametrize("data", [b"", b"abc", b"x" * (CHUNK_BYTES + 1)], ids=len)
def test_a_file_becomes_a_blob(blobs: Blobs, data: bytes) -> None:
    with blobs.spool() as path:
        path.write_bytes(data)
        blobs.put_file(path, digest_of(data))
    assert blobs.read(digest_of(data)) == data
    assert list(blobs.digests()) == [digest_of(data)]
    assert not path.exists()


def test_a_file_that_is_not_wanted_leaves_nothing(blobs: Blobs) -> None:
    with blobs.spool() as path:
        path.write_bytes(b"abc")
    assert not path.exists()
    assert list(blobs.digests()) == []


def test_every_writer_has_a_file_of_its_own_that_only_it_can_read(blobs: Blobs) -> None:
    with blobs.spool() as first, blobs.spool() as second:
        assert first != second
        assert first.stat().st_mode & 0o777 == 0o600


KILLED = """
import os, sys
from pathlib import Path
from prefix_store.backends.spool import Spool
with Spool(Path(sys.argv[1])).file() as path:
    path.write_bytes(b"half")
    print(path, flush=True)
    sys.stdin.readline()
    os._exit(9)
"""


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    empty = tmp_path / "killed before there was a lock"
    empty.mkdir()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        left = Path(writer.stdout.readline().strip())
        with spool.file() as mine:
            spool.tidy()
            assert (left.read_bytes(), mine.exists(), empty.exists()) == (b"half", True, False)
            writer.communicate("\n")
            spool.tidy()
            assert (left.parent.exists(), mine.exists()) == (False, True)
    assert list(tmp_path.iterdir()) == []


def test_a_file_tidied_before_it_is_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool, flock, tidied = Spool(tmp_path), fcntl.flock, []

    def tidy_first(descriptor: int, kind: int) -> None:
        if not tidied:
            tidied.append(True)
            spool.tidy()
        flock(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", tidy_first)
    with spool.file() as path:
        assert path.exists()
    assert tidied


def test_a_writer_may_put_another_file_in_its_place(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    (tmp_path / "made elsewhere").write_bytes(b"abc")
    with spool.file() as path:
        (tmp_path / "made elsewhere").rename(path)
        spool.tidy()
        assert path.read_bytes() == b"abc"


def test_another_users_folder_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(StoreUnavailable, match="another user"):
        Spool(tmp_path)


def test_where_nothing_can_be_written_the_store_is_unavailable(tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path / "blobs")
    (tmp_path / "blobs" / "tmp").rmdir()
    with pytest.raises(StoreUnavailable), blobs.spool():
        pass
