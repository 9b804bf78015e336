import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from prefix_store.codec import digest_of
from prefix_store.errors import InvalidName, InvalidPrefix, LeaseLost, PrefixNotFound, StoreCorrupt, StoreUnavailable
from prefix_store.prefix import Method, PrefixRef
from prefix_store.store import COLLECT_AFTER_SECONDS, Store
from tests.prefix_store.samples import manifest, tensors

ROOT = Path(__file__).parents[2]
EXAMPLES = [{"prompt": "a", "completion": "b"}]


def open_in(folder, **options):
    return Store.open(f"sqlite:///{folder}/store.db", **options)


@pytest.fixture
def store(tmp_path):
    opened = open_in(tmp_path)
    yield opened
    opened.close()


def save(store, name="support", tenant="acme", seed=0, **options):
    return store.prefixes.save(tenant, name, manifest(), tensors(manifest(), seed), **options)


def ref(text, tenant="acme"):
    return PrefixRef.parse(text, tenant)


# addresses


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
    assert store.prefixes.path(save(store)).is_relative_to(tmp_path / "elsewhere")
    store.close()


@pytest.mark.parametrize(
    "url", ["redis://user:secret@host/0", "store.db", "", "sqlite://", "sqlite:///", "sqlite://host/store.db"]
)
def test_other_addresses_are_refused_without_naming_secrets(url):
    with pytest.raises(StoreUnavailable, match="expected sqlite:///path") as caught:
        Store.open(url)
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("url", ["s3://bucket/path", "redis", "file://host/x"])
def test_other_blob_addresses_are_refused(tmp_path, url):
    with pytest.raises(StoreUnavailable, match="expected file:///path"):
        open_in(tmp_path, blobs=url)


# prefixes


@pytest.mark.parametrize("method", Method)
def test_what_is_saved_is_read_back(store, method):
    values = tensors(manifest(method))
    version = store.prefixes.save("acme", "support", manifest(method, base_digest="a" * 64), values)
    read, back = store.prefixes.read(version)
    assert read == manifest(method, base_digest="a" * 64)
    assert all(torch.equal(back[name], values[name]) for name in values)
    assert (version.method, version.base_digest) == (method, "a" * 64)
    assert version.digest == digest_of(store.prefixes.path(version))
    assert version.size_bytes == store.prefixes.path(version).stat().st_size


def test_references_resolve(store):
    first, second = save(store), save(store, seed=1)
    assert store.prefixes.resolve(ref("support")) == second
    assert store.prefixes.resolve(ref("support@1")) == first
    assert store.prefixes.resolve(ref("acme/support", tenant="other")) == second


@pytest.mark.parametrize("text", ["other", "support@9", "support@prod", "foreign"])
def test_what_is_not_there_is_not_found(store, text):
    save(store)
    save(store, "foreign", tenant="other")
    for act in (store.prefixes.resolve, store.prefixes.delete):
        with pytest.raises(PrefixNotFound, match=f"^no prefix acme/{text}$"):
            act(ref(text))
    assert store.prefixes.resolve(ref("support"))


def test_deleting(store):
    versions = [save(store, seed=seed) for seed in range(3)]
    assert store.prefixes.delete(ref("support@3")) == versions[2:]
    assert store.prefixes.resolve(ref("support")) == versions[1]
    assert store.prefixes.delete(ref("support")) == versions[:2]
    assert store.prefixes.ever_published("acme", "support")
    assert store.prefixes.page("acme") == []


def test_pages(store):
    for name in ["b", "a", "c"]:
        save(store, name)
    assert [version.name for version in store.prefixes.page("acme", limit=2)] == ["a", "b"]
    assert [version.name for version in store.prefixes.page("acme", after="b")] == ["c"]


@pytest.mark.parametrize(("tenant", "name"), [("acme", "Support"), ("acme", ""), ("../x", "support"), ("", "support")])
def test_illegal_names_are_refused(store, tenant, name):
    with pytest.raises(InvalidName):
        save(store, name, tenant)


def test_unsound_tensors_are_not_saved(store):
    with pytest.raises(InvalidPrefix):
        store.prefixes.save("acme", "support", manifest(), {"self.kv": torch.full((2, 2, 2, 5, 3), torch.nan)})
    assert not store.prefixes.ever_published("acme", "support")


def test_damage_is_noticed_when_reading(store):
    version = save(store)
    content = bytearray(store.prefixes.path(version).read_bytes())
    content[-1] ^= 1
    store.prefixes.path(version).write_bytes(content)
    with pytest.raises(StoreCorrupt):
        store.prefixes.read(version)


def test_a_jobs_result_is_saved_once(store):
    store.jobs.submit("acme", "support", EXAMPLES, {})
    job = store.jobs.claim("w", 60.0)
    version = save(store, job=job)
    assert (version.job_id, store.jobs.job("acme", job.id).version) == (job.id, 1)
    assert save(store, seed=1, job=job) == version


def test_a_stale_worker_saves_nothing(store):
    store.jobs.submit("acme", "support", EXAMPLES, {})
    job = store.jobs.claim("w", 0.0)
    store.jobs.claim("w2", 60.0)
    with pytest.raises(LeaseLost):
        save(store, job=job)
    assert not store.prefixes.ever_published("acme", "support")


# the store as a whole


def test_collect_keeps_what_a_record_names(tmp_path):
    store = open_in(tmp_path, clock=lambda: time.time() + 2 * COLLECT_AFTER_SECONDS)
    gone, kept = save(store), save(store, seed=1)
    job = store.jobs.submit("acme", "support", EXAMPLES, {})
    store.prefixes.delete(gone.ref)
    assert store.collect() == 1
    assert not store.prefixes.path(gone).exists()
    assert store.prefixes.read(kept)
    assert store.jobs.examples(job) == EXAMPLES
    store.close()


def test_collect_leaves_the_young(store):
    version = save(store)
    store.prefixes.delete(version.ref)
    assert store.collect() == 0
    assert store.prefixes.path(version).exists()


def test_ping(store, tmp_path):
    store.ping()
    (tmp_path / "blobs").rename(tmp_path / "away")
    with pytest.raises(StoreUnavailable):
        store.ping()


def test_a_closed_store_does_not_answer(store):
    store.close()
    with pytest.raises(StoreUnavailable):
        store.ping()


def test_killed_publishers_leave_only_whole_versions(tmp_path):
    """kill -9 at ten moments: what was reported as published is there, and what is there reads whole."""
    url = f"sqlite:///{tmp_path}/store.db"
    command = [sys.executable, "-m", "tests.prefix_store.killed_publisher", url, "10"]
    reported = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60).stdout.split()

    store = Store.open(url, clock=lambda: time.time() + 2 * COLLECT_AFTER_SECONDS)
    current = store.prefixes.resolve(ref("support"))
    store.collect()
    versions = [store.prefixes.resolve(ref(f"support@{number}")) for number in range(1, current.version + 1)]
    for version in versions:
        store.prefixes.read(version)
    assert {int(number) for number in reported} <= {version.version for version in versions}
    assert len(reported) >= 10
    blobs = [path.name for path in (tmp_path / "blobs" / "sha256").glob("*/*")]
    assert set(blobs) == {version.digest for version in versions}
    assert os.listdir(tmp_path / "blobs" / "tmp") == []
    store.close()
