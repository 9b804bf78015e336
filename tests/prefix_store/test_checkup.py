import pytest

from prefix_store import checkup, layout
from prefix_store.errors import StoreCorrupt, StoreUnavailable
from prefix_store.prefix import PrefixRef
from prefix_store.store import Store
from tests.prefix_store.samples import manifest, tensors, upload


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(checkup, "PAUSE_SECONDS", 0.0)
    opened = Store.open(f"sqlite:///{tmp_path}/store.db")
    yield opened
    opened.close()


def save(store, name="support", seed=0):
    return store.prefixes.save("acme", name, manifest(), tensors(manifest(), seed))


def faults(store):
    told = []
    report = checkup.examine(store, lambda done, total: told.append((done, total)))
    assert told == [(number, told[-1][1]) for number in range(1, len(told) + 1)]
    return report.faults


def test_whatever_was_done_to_a_store_its_counts_are_right(store):
    for seed in range(3):
        save(store, seed=seed)
    save(store, "other")
    store.prefixes.delete(PrefixRef("acme", "support", 2))
    store.prefixes.delete(PrefixRef("acme", "other"))
    for _ in range(2):
        store.jobs.submit("acme", "support", [{"prompt": "a", "completion": "b"}], {})
    store.jobs.claim("w", 60.0)
    upload(store, b'{"text": "a"}\n')
    store.files.delete("acme", upload(store, b'{"text": "b"}\n').id)
    assert faults(store) == []
    with store.backend.view() as view:
        assert checkup.recount(view, "acme") == store.tenants.usage("acme")


def test_a_lost_blob_of_a_job_is_named(store):
    job = store.jobs.submit("acme", "support", [{"prompt": "a", "completion": "b"}], {})
    store.blobs.remove_unless(job.spec.data_digest, lambda: False)
    (fault,) = faults(store)
    assert fault.startswith(f"{job.id}, its examples: blob")


def test_a_lost_blob_of_an_uploaded_file_is_named(store):
    file = upload(store, b'{"text": "a"}\n')
    store.blobs.remove_unless(file.digest, lambda: False)
    (fault,) = faults(store)
    assert fault.startswith(f"{file.id}: blob")


def test_a_version_that_is_deleted_meanwhile_is_no_fault(store, monkeypatch):
    version = save(store)
    look = store.blobs.file

    def file(digest):
        store.prefixes.delete(version.ref)
        store.blobs.remove_unless(digest, lambda: False)
        return look(digest)

    monkeypatch.setattr(store.blobs, "file", file)
    assert faults(store) == []


def test_an_alias_that_leads_nowhere_is_named(store):
    save(store)
    record = {"last": 1, "current": 1, "aliases": {"stable": 7}, "shared": []}
    store.backend.write(lambda transaction: transaction.put(layout.name("acme", "support"), record))
    assert faults(store) == ["acme/support: stable is 7, which is not there"]


def test_a_size_that_is_wrong_is_named(store):
    version = save(store)
    record = {**version.to_json(), "size_bytes": 1}
    store.backend.write(lambda transaction: transaction.put(layout.version("acme", "support", 1), record))
    assert faults(store)[0] == f"acme/support@1: its file has {version.size_bytes} bytes, not 1"


def test_a_damaged_database_is_noticed(store, tmp_path):
    store.backend.write(lambda transaction: [transaction.put(f"audit/{n}", {"x": "y" * 200}) for n in range(300)])
    store.close()
    content = bytearray((tmp_path / "store.db").read_bytes())
    content[3 * 4096 : 3 * 4096 + 60] = b"\xff" * 60
    (tmp_path / "store.db").write_bytes(content)
    broken = Store.open(f"sqlite:///{tmp_path}/store.db")
    with pytest.raises((StoreCorrupt, StoreUnavailable)):
        broken.backend.examine()
    broken.close()
