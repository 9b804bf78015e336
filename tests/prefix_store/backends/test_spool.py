"""Files that may become blobs, in a folder and in Redis."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefix_store.backends.base import Blobs
from prefix_store.backends.blobs import ABANDONED_SECONDS, FolderBlobs
from prefix_store.backends.redis_blobs import CHUNK_BYTES, RedisBlobs
from prefix_store.codec import digest_of
from prefix_store.errors import StoreUnavailable
from tests import redis_server


@pytest.fixture(params=["folder", "redis"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Blobs]:
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


def test_what_a_killed_writer_left_is_removed_after_a_while(tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path)
    with blobs.spool() as old, blobs.spool() as young:
        os.utime(old, (0, old.stat().st_mtime - ABANDONED_SECONDS - 1))
        blobs.tidy()
        assert (old.exists(), young.exists()) == (False, True)


def test_where_nothing_can_be_written_the_store_is_unavailable(tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path / "blobs")
    (tmp_path / "blobs" / "tmp").rmdir()
    with pytest.raises(StoreUnavailable), blobs.spool():
        pass
