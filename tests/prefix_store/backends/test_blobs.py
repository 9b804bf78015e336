"""The contract that `backends.base.Blobs` states, for a folder and for Redis, and what is theirs alone."""

import hashlib
import os
import threading

import pytest
import redis

from prefix_store.backends import redis_blobs
from prefix_store.backends.blobs import FolderBlobs
from prefix_store.backends.redis_client import BLOB, BLOBS, CHUNK
from prefix_store.errors import PayloadTooLarge, StoreCorrupt, StoreUnavailable
from prefix_store.store import Store
from tests.prefix_store.conftest import KINDS
from tests.prefix_store.samples import damage

HELLO = hashlib.sha256(b"hello").hexdigest()
MB = 1 << 20


def content(blobs, digest):
    with blobs.file(digest) as path:
        return path.read_bytes()


@pytest.fixture(params=["read", "file"])
def read(request, blobs):
    """Both ways to a blob's bytes."""
    return blobs.read if request.param == "read" else lambda digest: content(blobs, digest)


def test_a_blob_is_named_by_its_hash(blobs, read):
    assert blobs.put(b"hello") == HELLO
    assert read(HELLO) == b"hello"


@pytest.mark.parametrize("size", [0, 1, 4 * MB - 1, 4 * MB, 4 * MB + 1, 9 * MB])
def test_a_blob_of_any_size_is_whole(blobs, size):
    data = os.urandom(size)
    digest = blobs.put(data)
    assert blobs.read(digest) == data
    assert content(blobs, digest) == data


def test_equal_content_is_kept_once(blobs):
    assert blobs.put(b"hello") == blobs.put(b"hello")
    assert list(blobs.digests()) == [HELLO]


@pytest.mark.parametrize("data", [b"hellO", b"hell", b""])
def test_damage_is_noticed_and_healed_by_the_next_put(store, read, data):
    store.blobs.put(b"hello")
    damage(store, HELLO, data)
    with pytest.raises(StoreCorrupt, match="damaged"):
        read(HELLO)
    store.blobs.put(b"hello")
    assert read(HELLO) == b"hello"


def test_a_missing_blob_is_corruption(store, read):
    with pytest.raises(StoreCorrupt, match="missing"):
        read("0" * 64)
    store.blobs.put(b"hello")
    damage(store, HELLO, None)
    with pytest.raises(StoreCorrupt, match=r"missing|lost"):
        read(HELLO)


def test_a_folder_that_is_away_for_a_time_is_no_corruption(folder, tmp_path):
    folder.put(b"hello")
    away = folder.root.rename(tmp_path / "away")

    def open_it():
        with folder.file(HELLO):
            pass

    for act in (lambda: folder.read(HELLO), open_it, lambda: folder.put(b"more"), lambda: list(folder.digests())):
        with pytest.raises(StoreUnavailable):
            act()
    away.rename(folder.root)
    assert folder.read(HELLO) == b"hello"


def test_a_blob_is_removed_unless_it_is_needed(blobs):
    blobs.put(b"hello")
    assert not blobs.remove_unless(HELLO, lambda: True)
    assert blobs.read(HELLO) == b"hello"
    assert blobs.remove_unless(HELLO, lambda: False)
    assert list(blobs.digests()) == []
    with pytest.raises(StoreCorrupt, match="missing"):
        blobs.read(HELLO)
    assert blobs.remove_unless(HELLO, lambda: False)  # another collector was quicker


def test_a_blob_that_is_held_while_it_is_being_removed_stays_whole(store):
    """A writer holds and puts between the collector's question and its removal."""
    key = f"blob/{HELLO}/hold/x"
    store.blobs.put(b"hello")
    writers = []

    def write():
        store.backend.write(lambda transaction: transaction.put(key, {}))
        store.blobs.put(b"hello")

    def needed():
        with store.backend.view() as view:
            answer = view.get(key) is not None
        if not writers:
            writers.append(threading.Thread(target=write))
            writers[0].start()
            writers[0].join(0.2)  # a folder's writer waits until the removal is done
        return answer

    store.blobs.remove_unless(HELLO, needed)
    writers[0].join()
    assert store.blobs.read(HELLO) == b"hello"


def test_a_blob_that_is_put_over_and_over_is_never_lost_to_a_collector(store):
    stop = threading.Event()
    key = f"blob/{HELLO}/hold/x"

    def held():
        with store.backend.view() as view:
            return view.get(key) is not None

    def collect():
        while not stop.is_set():
            store.blobs.remove_unless(HELLO, held)

    collector = threading.Thread(target=collect)
    collector.start()
    try:
        for _ in range(30):
            store.backend.write(lambda transaction: transaction.put(key, {}))
            store.blobs.put(b"hello")
            assert store.blobs.read(HELLO) == b"hello"
            store.backend.write(lambda transaction: transaction.delete(key))
    finally:
        stop.set()
        collector.join()


def test_ping(blobs):
    blobs.ping()


# a folder's own


@pytest.fixture
def folder(tmp_path):
    return FolderBlobs(tmp_path / "deep" / "blobs")


def names(folder):
    return sorted(path.name for path in folder.root.rglob("*") if path.is_file() and path.name != "lock")


def test_only_the_owner_may_read(folder):
    path = folder._path(folder.put(b"hello"))
    assert path == folder.root / "sha256" / HELLO[:2] / HELLO
    modes = [path, path.parent, folder.root / "sha256", folder.root / "tmp", folder.root]
    assert [oct(entry.stat().st_mode & 0o777) for entry in modes] == ["0o600", *["0o700"] * 4]


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_what_is_no_digest_names_no_path(folder, digest):
    with pytest.raises(ValueError, match="not a sha256"):
        folder.read(digest)


def test_a_file_of_somebody_elses_is_left_alone(folder):
    folder.put(b"hello")
    (folder.root / "sha256" / HELLO[:2] / ".nfs0001").write_bytes(b"")
    assert list(folder.digests()) == [HELLO]


def test_a_failed_put_leaves_nothing(folder, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreUnavailable, match="No space left") as caught:
        folder.put(b"hello")
    assert str(tmp_path) not in caught.value.message
    assert names(folder) == []


def test_tidying_removes_what_killed_writers_left(folder):
    folder.put(b"hello")
    (folder.root / "tmp" / "left behind").write_bytes(b"")
    folder.tidy()
    assert names(folder) == [HELLO]


def test_a_blob_removed_while_it_is_read_stays_readable_for_who_has_opened_it(folder):
    folder.put(b"hello")
    with folder.file(HELLO) as path, path.open("rb") as file:
        folder.remove_unless(HELLO, lambda: False)
        assert file.read() == b"hello"


def test_a_blob_removed_before_it_is_opened_is_missing(folder):
    folder.put(b"hello")

    def remove_and_read():
        with folder.file(HELLO) as path:
            folder.remove_unless(HELLO, lambda: False)
            path.read_bytes()

    def read_something_else():
        with folder.file(HELLO) as path:
            (path.parent / "something else").read_bytes()

    with pytest.raises(StoreCorrupt, match="missing"):
        remove_and_read()
    folder.put(b"hello")
    with pytest.raises(FileNotFoundError):
        read_something_else()


def test_a_folder_that_is_gone_does_not_answer(folder):
    folder.ping()
    (folder.root / "tmp").rmdir()
    with pytest.raises(StoreUnavailable):
        folder.ping()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreUnavailable):
        FolderBlobs(tmp_path / "file" / "blobs")


# Redis's own


@pytest.fixture(params=[kind for kind in KINDS if kind != "sqlite"])
def served(request, servers):
    store = Store.open(servers(request.param).url)
    yield store
    store.close()


def test_what_is_too_large_for_redis_is_refused_with_the_way_out(served, monkeypatch):
    assert redis_blobs.LARGEST == 256 * MB
    monkeypatch.setattr(redis_blobs, "LARGEST", 5 * MB)
    with pytest.raises(PayloadTooLarge, match=r"up to 5 MB, got 6 MB.*ANTEFIX_BLOBS"):
        served.blobs.put(bytes(6 * MB))
    assert list(served.blobs.digests()) == []


def test_no_value_is_so_large_that_others_wait_for_it(served):
    digest = served.blobs.put(os.urandom(9 * MB))
    client = served.blobs._client
    assert [client.strlen(CHUNK.format(digest=digest, number=number)) for number in range(3)] == [4 * MB, 4 * MB, MB]


def test_a_put_that_was_cut_off_is_not_there_and_can_be_collected(served, monkeypatch):
    data = os.urandom(9 * MB)
    digest = hashlib.sha256(data).hexdigest()
    whole = redis.Redis.set

    def die(self, key, *args, **options):
        if key == CHUNK.format(digest=digest, number=2):
            raise KeyboardInterrupt
        return whole(self, key, *args, **options)

    monkeypatch.setattr(redis.Redis, "set", die)
    with pytest.raises(KeyboardInterrupt):
        served.blobs.put(data)
    with pytest.raises(StoreCorrupt, match="missing"):
        served.blobs.read(digest)
    assert list(served.blobs.digests()) == [digest]
    assert served.collect() == 1
    assert list(served.blobs._client.scan_iter("antefix:blob*")) == []


def test_removing_takes_every_key(served):
    digest = served.blobs.put(bytes(9 * MB))
    client = served.blobs._client
    assert client.exists(BLOBS, BLOB.format(digest=digest), CHUNK.format(digest=digest, number=2)) == 3
    served.blobs.remove_unless(digest, lambda: False)
    assert list(client.scan_iter("antefix:blob*")) == []


def test_a_store_that_never_rests_keeps_a_blob_for_the_next_time(served):
    served.blobs.put(b"hello")
    changes = iter(range(100))

    def needed():
        number = next(changes)
        served.backend.write(lambda transaction: transaction.put(f"a/{number}", 0))
        return False

    assert not served.blobs.remove_unless(HELLO, needed)
    assert served.blobs.read(HELLO) == b"hello"


def test_a_folder_among_the_temporary_files_is_left_alone(folder):
    (folder.root / "tmp" / "stray" / "inner").mkdir(parents=True)
    folder.tidy()
    assert (folder.root / "tmp" / "stray" / "inner").is_dir()
