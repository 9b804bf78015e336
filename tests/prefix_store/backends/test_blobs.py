import hashlib
import os
import threading
import time

import pytest

from prefix_store.backends.blobs import Blobs
from prefix_store.errors import StoreCorrupt, StoreUnavailable

HOUR = 3600.0


@pytest.fixture
def later():
    """Lets the collector's clock run ahead of the files' times."""
    return [0.0]


@pytest.fixture
def blobs(tmp_path, later):
    return Blobs(tmp_path / "deep" / "blobs", clock=lambda: time.time() + later[0])


def names(blobs):
    return sorted(path.name for path in blobs.root.rglob("*") if path.is_file() and path.name != "lock")


def test_a_blob_is_named_by_its_hash(blobs):
    digest = blobs.put(b"hello")
    assert digest == hashlib.sha256(b"hello").hexdigest()
    assert blobs.path(digest) == blobs.root / "sha256" / digest[:2] / digest
    assert blobs.read(digest) == b"hello"
    assert blobs.verify(digest).read_bytes() == b"hello"


def test_equal_content_is_kept_once(blobs):
    assert blobs.put(b"hello") == blobs.put(b"hello")
    assert len(names(blobs)) == 1


def test_only_the_owner_may_read(blobs):
    path = blobs.path(blobs.put(b"hello"))
    modes = [path, path.parent, blobs.root / "sha256", blobs.root / "tmp", blobs.root]
    assert [oct(entry.stat().st_mode & 0o777) for entry in modes] == ["0o600", *["0o700"] * 4]


@pytest.mark.parametrize("read", [Blobs.read, Blobs.verify])
def test_damage_is_noticed_and_healed_by_the_next_put(blobs, read):
    digest = blobs.put(b"hello")
    blobs.path(digest).write_bytes(b"hellO")
    with pytest.raises(StoreCorrupt, match="damaged"):
        read(blobs, digest)
    blobs.put(b"hello")
    assert read(blobs, digest)


@pytest.mark.parametrize("read", [Blobs.read, Blobs.verify])
def test_a_missing_blob_is_corruption(blobs, read):
    with pytest.raises(StoreCorrupt, match="missing"):
        read(blobs, "0" * 64)


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_what_is_no_digest_names_no_path(blobs, digest):
    with pytest.raises(ValueError, match="not a sha256"):
        blobs.path(digest)


def test_a_failed_put_leaves_nothing(blobs, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreUnavailable, match="No space left") as caught:
        blobs.put(b"hello")
    assert str(tmp_path) not in caught.value.message
    assert names(blobs) == []


def test_collect_removes_what_is_old_and_unnamed(blobs, later):
    kept, dropped = blobs.put(b"kept"), blobs.put(b"dropped")
    (blobs.root / "tmp" / "left behind").write_bytes(b"")
    assert blobs.collect({kept}, HOUR) == 0
    later[0] = 2 * HOUR
    assert blobs.collect({kept}, HOUR) == 2
    assert names(blobs) == [kept]
    assert not blobs.path(dropped).exists()


def test_putting_again_makes_a_blob_young(blobs, later):
    digest = blobs.put(b"hello")
    os.utime(blobs.path(digest), (0, 0))
    blobs.put(b"hello")
    assert blobs.collect(set(), HOUR) == 0
    assert blobs.read(digest) == b"hello"


def test_a_blob_being_put_is_never_collected(blobs):
    """Every put of content that stands there old races with a collector; none may be lost."""
    digest, stop = blobs.put(b"hello"), threading.Event()

    def collect():
        while not stop.is_set():
            blobs.collect(set(), HOUR)

    collector = threading.Thread(target=collect)
    collector.start()
    try:
        for _ in range(100):
            blobs.put(b"hello")
            assert blobs.read(digest) == b"hello"
            os.utime(blobs.path(digest), (0, 0))
    except FileNotFoundError:
        pytest.fail("a fresh blob was collected")
    finally:
        stop.set()
        collector.join()


def test_ping(blobs):
    blobs.ping()
    (blobs.root / "tmp").rmdir()
    with pytest.raises(StoreUnavailable):
        blobs.ping()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreUnavailable):
        Blobs(tmp_path / "file" / "blobs")
