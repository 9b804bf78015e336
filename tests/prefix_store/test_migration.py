"""From one kind of store into another."""

import pytest

from prefix_store.errors import Conflict, PrefixNotFound, StoreCorrupt, StoreUnavailable
from prefix_store.migration import FOLDERS, fingerprint, migrate
from prefix_store.prefix import PrefixRef
from prefix_store.store import Store
from tests.prefix_store import invariants
from tests.prefix_store.samples import damage, enqueue, manifest, publish, tensors, upload


def fill(store):
    store.tenants.create("acme")
    store.tenants.set_quotas("acme", {"jobs": 9})
    presented, _ = store.keys.create("acme", ["admin"])
    for seed, options in enumerate([{}, {"metadata": {"for": "Grüße \ud7ff"}}, {"lifetime": 1e6}]):
        store.prefixes.save("acme", "support", manifest(), tensors(manifest(), seed), **options)
    store.prefixes.delete(PrefixRef("acme", "support", 1))
    store.prefixes.set_alias("acme", "support", "live", 2)
    store.prefixes.share("acme", "support", ["other"])
    store.prefixes.delete(store.prefixes.save("acme", "gone", manifest(), tensors(manifest(), 9)).ref)
    upload(store, b'{"text": "a"}\n')
    for _ in range(3):
        store.jobs.submit("acme", "support", [{"prompt": "a", "completion": "b"}], {"init_text": "\ud800"})
    job = store.jobs.claim("w", 60.0)
    store.jobs.add_event(job, "message", {"message": "started"})
    store.jobs.save_checkpoint(job, b"where it stands")
    return presented


@pytest.fixture
def source(tmp_path, clock):
    store = Store.open(f"sqlite:///{tmp_path}/source/store.db", clock=clock)
    yield store
    store.close()


@pytest.fixture
def target(store):
    return store


def test_there_and_back_everything_is_as_it_was(source, target, tmp_path, clock):
    presented = fill(source)
    said = []
    count = migrate(source, target, said.append)
    back = Store.open(f"sqlite:///{tmp_path}/back/store.db", clock=clock)
    assert migrate(target, back, said.append) == count == sum(map(len, invariants.records(source.backend).values()))
    assert invariants.records(back.backend) == invariants.records(source.backend)
    assert fingerprint(source) == fingerprint(target) == fingerprint(back)
    assert set(back.blobs.digests()) == set(source.blobs.digests())
    assert said[:2] == ["blobs: 7 of 7", f"records: {count}"]
    for store in (target, back):
        assert store.keys.authenticate(presented)
        invariants.check(store.backend)
        invariants.check_whole(store)
        assert store.prefixes.save("acme", "gone", manifest(), tensors(manifest(), 1)).version == 2
        assert store.jobs.claim("w", 60.0)
    back.close()


def test_a_store_is_no_copy_of_itself(tmp_path, source):
    fill(source)
    again = Store.open(f"sqlite:///{tmp_path}/source/../source/store.db")
    with pytest.raises(Conflict, match="one store"):
        migrate(source, again, lambda line: None)
    again.close()


def test_a_store_with_something_else_in_it_is_no_target(source, target):
    fill(source)
    publish(target.backend, "mine")
    with pytest.raises(Conflict, match="not empty"):
        migrate(source, target, lambda line: None)
    assert invariants.records(target.backend)["name"].keys() == {"acme/mine"}


def test_cut_off_it_is_done_again_into_the_same_target(source, target, url, monkeypatch):
    fill(source)
    write, left = target.backend.write, [4]

    def die_after_some(work):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return write(work)

    monkeypatch.setattr(target.backend, "write", die_after_some)
    with pytest.raises(KeyboardInterrupt):
        migrate(source, target, lambda line: None)
    monkeypatch.undo()
    with pytest.raises(StoreUnavailable, match="cut off"):
        Store.open(url)
    migrate(source, target, lambda line: None)
    assert fingerprint(source) == fingerprint(target)
    Store.open(url).close()


def test_a_damaged_blob_stops_it(source, target):
    fill(source)
    version = source.prefixes.resolve(PrefixRef("acme", "support"))
    damage(source, version.digest, b"x")
    with pytest.raises(StoreCorrupt, match="damaged"):
        migrate(source, target, lambda line: None)
    with pytest.raises(PrefixNotFound):
        target.prefixes.resolve(version.ref)


def test_a_source_that_changes_meanwhile_is_noticed(source, target):
    fill(source)

    def say(line):
        if line.startswith("records"):
            enqueue(source.backend, "ftjob-late")

    with pytest.raises(StoreCorrupt, match="did something write"):
        migrate(source, target, say)


def test_a_fingerprint_is_of_every_folder(source):
    seen = {fingerprint(source)}
    for folder in FOLDERS:
        source.backend.write(lambda transaction, folder=folder: transaction.put(f"{folder}/a/b", {}))
        seen.add(fingerprint(source))
    assert len(seen) == len(FOLDERS) + 1
