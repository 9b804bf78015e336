import shutil
import sqlite3

import pytest

from prefix_store.backends.blobs import FolderBlobs
from prefix_store.errors import StoreUnavailable
from prefix_store.store import Store
from tests.prefix_store.conftest import SERVERS
from tests.prefix_store.samples import manifest, tensors


def open_in(folder, **options):
    return Store.open(f"sqlite:///{folder}/store.db", **options)


def save(store):
    return store.prefixes.save("acme", "support", manifest(), tensors(manifest()))


def test_a_store_is_made_where_the_address_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store.open("sqlite:///data/store.db")
    monkeypatch.chdir("/")  # a relative address means the folder at the time of opening
    save(store)
    store.close()
    assert (tmp_path / "data" / "store.db").is_file()
    assert (tmp_path / "data" / "blobs" / "sha256").is_dir()
    assert oct((tmp_path / "data").stat().st_mode & 0o777) == "0o700"


def test_blobs_may_be_elsewhere(tmp_path):
    store = open_in(tmp_path, blobs=f"file://{tmp_path}/elsewhere")
    with store.prefixes.file(save(store)) as path:
        assert path.is_relative_to(tmp_path / "elsewhere")
    store.close()


@pytest.mark.parametrize("kind", SERVERS)
def test_a_redis_store_may_keep_its_blobs_in_a_folder(kind, servers, tmp_path):
    store = Store.open(servers(kind).url, blobs=f"file://{tmp_path}/blobs")
    version = save(store)
    assert store.prefixes.read(version)
    assert [path.name for path in (tmp_path / "blobs" / "sha256").glob("*/*")] == [version.digest]
    assert not list(store.backend._client.scan_iter("antefix:blob*"))
    assert store.collect() == 0
    store.close()


def test_a_blob_folder_serves_one_store(tmp_path):
    store = open_in(tmp_path / "one", blobs=f"file://{tmp_path}/blobs")
    version = save(store)
    with pytest.raises(StoreUnavailable, match=r"another store.s .*one/store.db"):
        open_in(tmp_path / "two", blobs=f"file://{tmp_path}/blobs")
    store.close()
    store = open_in(tmp_path / "one", blobs=f"file://{tmp_path}/blobs")
    assert store.prefixes.read(version)
    store.close()


@pytest.mark.parametrize("kind", SERVERS)
def test_a_blob_folder_serves_one_redis(kind, servers, tmp_path):
    url = servers(kind).url
    Store.open(url, blobs=f"file://{tmp_path}/blobs").close()
    with pytest.raises(StoreUnavailable, match="another store's"):
        open_in(tmp_path, blobs=f"file://{tmp_path}/blobs")
    with pytest.raises(StoreUnavailable, match="in Redis"):
        open_in(tmp_path)
    Store.open(url, blobs=f"file://{tmp_path}/blobs").close()


def test_a_copy_of_a_store_needs_a_copy_of_its_blobs(tmp_path):
    original = open_in(tmp_path)
    version = save(original)
    with sqlite3.connect(tmp_path / "store.db") as source, sqlite3.connect(tmp_path / "copy.db") as target:
        source.backup(target)
    with pytest.raises(StoreUnavailable, match=r"copy.db is a copy of .*store.db"):
        Store.open(f"sqlite:///{tmp_path}/copy.db")
    shutil.copytree(tmp_path / "blobs", tmp_path / "copied")
    copy = Store.open(f"sqlite:///{tmp_path}/copy.db", blobs=f"file://{tmp_path}/copied")
    copy.prefixes.delete(version.ref)
    copy.close()
    assert original.prefixes.read(version)
    original.close()


def test_a_store_may_be_moved_and_restored(tmp_path):
    store = open_in(tmp_path / "here")
    version = save(store)
    store.close()
    shutil.copytree(tmp_path / "here", tmp_path / "backup")
    (tmp_path / "here").rename(tmp_path / "there")
    for folder in ("there", "backup"):
        store = open_in(tmp_path / folder)
        assert store.prefixes.read(version)
        store.close()
    (tmp_path / "there" / "store.db").rename(tmp_path / "there" / "renamed.db")
    store = Store.open(f"sqlite:///{tmp_path}/there/renamed.db")
    assert store.prefixes.read(version)
    store.close()


def test_nothing_is_done_for_a_store_that_cannot_be_had(tmp_path):
    with pytest.raises(StoreUnavailable):
        Store.open(f"unix://{tmp_path}/no.sock")


@pytest.mark.parametrize(
    "url", ["mysql://user:secret@host/0", "store.db", "", "sqlite://", "sqlite:///", "sqlite://host/store.db"]
)
def test_other_addresses_are_refused_without_naming_secrets(url):
    with pytest.raises(StoreUnavailable, match="expected sqlite:///path or redis://") as caught:
        Store.open(url)
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("url", ["s3://bucket/path", "redis", "file://host/x"])
def test_other_blob_addresses_are_refused(tmp_path, url):
    with pytest.raises(StoreUnavailable, match="blobs address"):
        open_in(tmp_path, blobs=url)


def test_a_store_in_use_answers_and_a_closed_one_does_not(store):
    store.ping()
    store.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        store.ping()


def test_a_store_whose_blobs_are_gone_does_not_answer(tmp_path):
    store = open_in(tmp_path)
    store.ping()
    (tmp_path / "blobs").rename(tmp_path / "away")
    with pytest.raises(StoreUnavailable):
        store.ping()
    store.close()


def test_two_open_stores_are_one(store, url, clock):
    other = Store.open(url, clock=clock)
    version = save(store)
    assert other.prefixes.resolve(version.ref) == version
    assert other.prefixes.read(version)
    assert isinstance(other.blobs, FolderBlobs) == url.startswith("sqlite")
    other.close()


def test_blobs_lie_beside_the_file_whatever_the_folder_is_called(tmp_path):
    folder = tmp_path / "a b%20é#?"
    store = Store.open(f"sqlite:///{folder}/store.db")
    version = store.prefixes.save("acme", "support", manifest(), tensors(manifest()))
    with store.prefixes.file(version) as path:
        assert path.is_relative_to(folder / "blobs")
    store.close()
