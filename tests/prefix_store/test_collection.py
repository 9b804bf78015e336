"""What leaves the store, and what stays, on every backend."""

import threading

import pytest

from prefix_store.collection import TOMBSTONE_SECONDS
from prefix_store.errors import PreconditionFailed, PrefixNotFound, QuotaExceeded, StoreCorrupt, StoreUnavailable
from prefix_store.holds import HOLD_SECONDS
from prefix_store.prefix import PrefixRef
from prefix_store.store import Store
from tests.prefix_store import invariants
from tests.prefix_store.samples import damage, manifest, publish, tensors

EXAMPLES = [{"prompt": "a", "completion": "b"}]


def save(store, name="support", tenant="acme", seed=0, **options):
    return store.prefixes.save(tenant, name, manifest(), tensors(manifest(), seed), **options)


def digests(store):
    return set(store.blobs.digests())


def test_what_a_record_names_is_kept(store, clock):
    gone, kept = save(store), save(store, seed=1)
    job = store.jobs.submit("acme", "support", EXAMPLES, {})
    store.prefixes.delete(gone.ref)
    clock.now += TOMBSTONE_SECONDS
    assert store.collect() == 1
    assert digests(store) == {kept.digest, job.spec.data_digest}
    assert store.prefixes.read(kept)
    assert store.jobs.examples(job) == EXAMPLES
    assert store.collect() == 0


def test_a_deleted_versions_file_stays_for_whoever_has_just_found_it(store, clock):
    version = save(store)
    store.prefixes.delete(version.ref)
    clock.now += TOMBSTONE_SECONDS - 1
    assert store.collect() == 0
    assert store.prefixes.read(version)
    clock.now += 1
    assert store.collect() == 1
    with pytest.raises(PrefixNotFound):
        store.prefixes.read(version)
    found = invariants.records(store.backend)
    assert not found["tombstone"]
    assert not found["blob"]


def test_a_file_that_is_lost_is_corruption_and_not_absence(store):
    version = save(store)
    damage(store, version.digest, None)
    with pytest.raises(StoreCorrupt):
        store.prefixes.read(version)


def test_content_that_was_published_again_is_kept(store, clock):
    store.prefixes.delete(save(store).ref)
    clock.now += TOMBSTONE_SECONDS - 1
    again = save(store, "other")
    clock.now += 1
    assert store.collect() == 0
    assert store.prefixes.read(again)


def test_an_expired_version_becomes_a_deleted_one(store, clock):
    version = save(store, lifetime=60.0)
    save(store, "stays", seed=1)
    clock.now += 60
    assert store.collect() == 0
    assert store.prefixes.versions("acme", "support") == []
    invariants.check(store.backend)
    assert store.prefixes.read(version)
    clock.now += TOMBSTONE_SECONDS
    assert store.collect() == 1
    assert save(store, lifetime=60.0).version == 2


def test_what_has_expired_is_as_good_as_collected(store, clock):
    first, last = save(store), save(store, seed=1)
    ending = save(store, seed=2, lifetime=60.0)
    bare = PrefixRef("acme", "support")
    store.prefixes.set_alias("acme", "support", "live", 3)
    save(store, "ends", seed=3, lifetime=60.0)
    clock.now += 60
    for _ in range(2):
        assert store.prefixes.resolve(bare) == last
        assert store.prefixes.page("acme") == [last]
        for gone in (ending.ref, PrefixRef("acme", "support", alias="live"), PrefixRef("acme", "ends")):
            with pytest.raises(PrefixNotFound):
                store.prefixes.resolve(gone)
        store.collect()
    save(store, seed=4, lifetime=60.0)
    clock.now += 60
    assert store.prefixes.make_current("acme", "support", None) == first
    with pytest.raises(PreconditionFailed):
        save(store, seed=5, if_match=ending.digest)
    assert save(store, seed=5, if_match=first.digest).version == 5


def test_what_has_expired_does_not_keep_a_tenant_from_publishing(store, clock):
    store.tenants.create("acme")
    store.tenants.set_quotas("acme", {"prefixes": 2})
    save(store, "stays")
    save(store, "ends", seed=1, lifetime=60.0)
    with pytest.raises(QuotaExceeded):
        save(store, "new", seed=2)
    clock.now += 60
    assert save(store, "new", seed=2).version == 1
    invariants.check(store.backend)
    with pytest.raises(QuotaExceeded):
        save(store, "newer", seed=2)


def test_an_expired_version_takes_its_alias_along_and_uncovers_the_one_below(store, clock):
    first = save(store)
    save(store, seed=1, lifetime=60.0)
    store.prefixes.set_alias("acme", "support", "next", 2)
    clock.now += 60
    store.collect()
    assert store.prefixes.resolve(PrefixRef("acme", "support")) == first
    assert store.prefixes.describe(first).aliases == {}
    invariants.check(store.backend)


def test_what_was_pinned_after_its_time_was_set_stays(store, clock):
    version = save(store, lifetime=60.0)
    store.prefixes.edit(version.ref, {"pinned": True})
    clock.now += 100
    store.collect()
    assert store.prefixes.read(store.prefixes.resolve(version.ref))
    store.prefixes.edit(version.ref, {"pinned": False, "lifetime": None})
    store.collect()
    assert store.prefixes.resolve(version.ref).expires_at is None
    invariants.check(store.backend)


def test_what_a_killed_writer_left_goes_when_its_hold_lapses(store, clock, monkeypatch):
    def die(*arguments):
        raise SystemExit

    monkeypatch.setattr(store.prefixes._catalog, "publish", die)
    monkeypatch.setattr(store.backend, "write", _without_deleting(store.backend.write))
    with pytest.raises(SystemExit):
        save(store)
    clock.now += HOLD_SECONDS
    assert store.collect() == 0
    monkeypatch.undo()
    clock.now += 1
    assert store.collect() == 1
    assert not invariants.records(store.backend)["blob"]


def _without_deleting(write):
    """What a killed writer does not come to."""

    class Deaf:
        def __init__(self, transaction):
            self._transaction = transaction

        def __getattr__(self, name):
            return (lambda key: None) if name == "delete" else getattr(self._transaction, name)

    return lambda work: write(lambda transaction: work(Deaf(transaction)))


def test_a_writer_that_outlasts_its_hold_publishes_nothing(store, clock):
    """Its blob may be gone by then: better a failure than a version without a file."""
    put_file = store.blobs.put_file

    def take_too_long(path, digest):
        put_file(path, digest)
        clock.now += HOLD_SECONDS + 1
        store.collect()

    store.blobs.put_file = take_too_long
    with pytest.raises(StoreUnavailable, match="took too long"):
        save(store)
    assert store.prefixes.page("acme") == []


@pytest.mark.parametrize("moment", ["held", "put", "published"])
def test_a_collection_in_the_middle_of_a_publish_takes_nothing(store, clock, moment):
    """Content that was deleted long ago, so that its blob is due, is published again."""
    gone = save(store)
    store.prefixes.delete(gone.ref)
    clock.now += TOMBSTONE_SECONDS
    put_file, publish_ = store.blobs.put_file, store.prefixes._catalog.publish
    collected = []

    def collect():
        collected.append(moment)
        store.collect()

    def putting(path, digest):
        if moment == "held":
            collect()
        put_file(path, digest)
        if moment == "put":
            collect()

    def publishing(*arguments):
        version = publish_(*arguments)
        if moment == "published":
            collect()
        return version

    store.blobs.put_file, store.prefixes._catalog.publish = putting, publishing
    version = save(store)
    assert store.prefixes.read(version)
    assert collected == [moment]


def test_collectors_and_publishers_of_the_same_content_get_along(store, url, clock):
    """Two names take turns publishing and deleting one content, while a collector takes all that is free."""
    stop = threading.Event()
    failures = []

    def collect():
        collector = Store.open(url, clock=lambda: clock.now + 2 * TOMBSTONE_SECONDS)
        while not stop.is_set():
            collector.collect()
        collector.close()

    def publish_and_delete(name):
        try:
            for _ in range(12):
                version = save(store, name)
                store.prefixes.read(store.prefixes.resolve(version.ref))
                store.prefixes.delete(version.ref)
        except StoreUnavailable as error:
            # the collector's clock is ahead of ours, so to it a hold may have lapsed
            failures.extend([error] if "took too long" not in error.message else [])

    threads = [threading.Thread(target=publish_and_delete, args=(name,)) for name in ("a", "b")]
    collector = threading.Thread(target=collect)
    for thread in (*threads, collector):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    collector.join()
    assert failures == []
    invariants.check(store.backend)


def test_a_collection_that_is_cut_off_is_finished_by_the_next(store, clock, monkeypatch):
    for seed in range(6):
        store.prefixes.delete(save(store, seed=seed).ref)
    kept = save(store, seed=6)
    clock.now += TOMBSTONE_SECONDS
    remove, left = store.blobs.remove_unless, [3]

    def die_after_some(digest, needed):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return remove(digest, needed)

    monkeypatch.setattr(store.blobs, "remove_unless", die_after_some)
    with pytest.raises(KeyboardInterrupt):
        store.collect()
    monkeypatch.undo()
    assert store.collect() == 3
    assert digests(store) == {kept.digest}


def test_many_tombstones_go_in_one_collection(store, backend, clock):
    version = publish(backend)

    def fill(transaction):
        for number in range(2, 1204):
            path = f"acme/support/{number:09d}"
            transaction.put(f"tombstone/{path}", {"digest": version.digest, "at": 1000.0})
            transaction.put(f"blob/{version.digest}/version/{path}", {})

    backend.write(fill)
    clock.now += TOMBSTONE_SECONDS
    store.collect()
    invariants.check(backend)
    assert len(invariants.records(backend)["blob"]) == 1
