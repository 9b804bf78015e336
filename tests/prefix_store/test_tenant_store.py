"""Tenants and how they are erased, on every backend."""

import dataclasses

import pytest

from prefix_store import tenant_store
from prefix_store.errors import (
    Conflict,
    InvalidName,
    InvalidRequest,
    NotFound,
    PrefixNotFound,
    StoreUnavailable,
    Unauthorized,
)
from prefix_store.prefix import PrefixRef
from prefix_store.store import Store
from prefix_store.tenants import Quotas
from tests.prefix_store import invariants
from tests.prefix_store.conftest import SERVERS
from tests.prefix_store.samples import manifest, publish, tensors, upload

MARKER = "m4rk3r"


@pytest.fixture
def tenants(store):
    return store.tenants


def files(tmp_path, servers_folder):
    """Every file in which the store may have left something."""
    folders = [tmp_path] if servers_folder is None else [tmp_path, servers_folder]
    return [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def plant(store, tenant):
    """Something of every kind that a tenant can have, with the marker in all of it."""
    store.tenants.create(tenant)
    store.keys.create(tenant, ["admin"])
    template = manifest(template=f"{MARKER} {{prompt}}")
    kept = store.prefixes.save(tenant, f"{MARKER}-a", template, tensors(template, 1), metadata={MARKER: MARKER})
    gone = store.prefixes.save(tenant, f"{MARKER}-b", template, tensors(template, 2), lifetime=60.0)
    store.prefixes.set_alias(tenant, kept.name, MARKER, 1)
    store.prefixes.share(tenant, kept.name, ["other", "*"])
    store.prefixes.save(tenant, gone.name, template, tensors(template, 3))
    store.prefixes.delete(gone.ref)
    store.prefixes.save(tenant, f"{MARKER}-c", template, tensors(template, 4))
    store.prefixes.delete(PrefixRef(tenant, f"{MARKER}-c"))
    upload(store, f'{{"text": "{MARKER}"}}\n'.encode(), tenant, f"{MARKER}.jsonl")
    examples = [{"prompt": MARKER, "completion": MARKER}]
    for options in ({}, {"init_text": MARKER}):
        store.jobs.submit(tenant, f"{MARKER}-a", examples, options, about={"metadata": {MARKER: MARKER}})
    job = store.jobs.claim(MARKER, 60.0)
    store.jobs.add_event(job, "message", {"message": MARKER})
    store.jobs.heartbeat(job, 60.0, {MARKER: MARKER})
    return job


# tenants and quotas


def test_a_tenant_is_made_once(tenants):
    made = tenants.create("acme")
    assert (made.name, made.created_at, made.quotas) == ("acme", 1000.0, Quotas())
    assert list(tenants.all()) == [made]
    with pytest.raises(Conflict):
        tenants.create("acme")
    with pytest.raises(InvalidName):
        tenants.create("Acme Inc.")


def test_quotas_are_changed_one_by_one(tenants):
    tenants.create("acme")
    assert tenants.quotas("acme") == tenants.quotas("nobody") == Quotas()
    assert tenants.set_quotas("acme", {"prefixes": 3, "jobs": 0}) == Quotas(prefixes=3, jobs=0)
    assert tenants.set_quotas("acme", {"jobs": None, "bytes": 7}) == Quotas(prefixes=3, bytes=7)
    assert tenants.quotas("acme") == Quotas(prefixes=3, bytes=7)


@pytest.mark.parametrize("changes", [{"prefixez": 1}, {"prefixes": -1}, {"prefixes": 1.5}, {"bytes": True}])
def test_quotas_of_no_use_are_refused(tenants, changes):
    tenants.create("acme")
    with pytest.raises(InvalidRequest):
        tenants.set_quotas("acme", changes)
    assert tenants.quotas("acme") == Quotas()


def test_nobody_has_no_quotas_to_change(tenants):
    with pytest.raises(NotFound):
        tenants.set_quotas("nobody", {"prefixes": 1})


# erasing


@pytest.mark.parametrize("tenant", ["acme", MARKER])
def test_no_byte_of_an_erased_tenant_remains(store, kind, tmp_path, servers, tenant):
    folder = servers(kind).folder if kind in SERVERS else None
    plant(store, tenant)
    publish(store.backend, "theirs", "other", digest="b")
    store.prefixes.share("other", "theirs", [tenant, "third"])
    marked = [path for path in files(tmp_path, folder) if MARKER.encode() in path.read_bytes()]
    assert marked
    assert store.erase_tenant(tenant) > 30
    for path in files(tmp_path, folder):
        assert MARKER.encode() not in path.read_bytes(), path
    assert list(store.blobs.digests()) == []
    left = invariants.records(store.backend)
    assert {name: len(found) for name, found in left.items() if found and name != "audit"} == {
        **{"name": 1, "version": 1, "blob": 1, "usage": 1, "shared": 1}
    }
    invariants.check(store.backend)
    assert store.erase_tenant(tenant) == 0


def test_an_erased_tenant_can_do_nothing_and_leaves_one_line(store):
    presented, _ = store.keys.create("acme", ["admin"])
    job = plant_little(store)
    store.tenants.erase("acme", by="key abcdefgh")
    with pytest.raises(Unauthorized):
        store.keys.authenticate(presented)
    with pytest.raises(PrefixNotFound):
        store.prefixes.resolve(PrefixRef("acme", f"{MARKER}-a"))
    assert store.jobs.job("acme", job.id) is None
    assert store.jobs.claim("w", 60.0) is None
    (line,) = store.audit.entries()
    assert (line.action, line.by, line.tenant, len(line.target)) == ("tenant.erase", "key abcdefgh", "", 16)
    with pytest.raises(InvalidName):
        store.tenants.erase("../x")


def plant_little(store):
    template = manifest()
    store.prefixes.save("acme", f"{MARKER}-a", template, tensors(template))
    return store.jobs.submit("acme", f"{MARKER}-a", [{"prompt": "a", "completion": "b"}], {})


def test_others_lose_nothing(store):
    template = manifest()
    mine = store.prefixes.save("acme", "support", template, tensors(template))
    theirs = store.prefixes.save("acme-2", "support", template, tensors(template))
    assert mine.digest == theirs.digest
    _, key = store.keys.create("acme-2", ["admin"])
    before = store.tenants.usage("acme-2")
    store.erase_tenant("acme")
    assert store.prefixes.read(store.prefixes.resolve(theirs.ref))
    assert list(store.keys.all()) == [key]
    assert store.tenants.usage("acme-2") == before
    assert [tenant.name for tenant in store.tenants.all()] == ["acme-2"]


def test_an_erased_reader_loses_the_share_and_a_later_one_of_that_name_does_not_get_it(store, backend):
    publish(backend, "support", "acme")
    store.prefixes.share("acme", "support", ["other", "third"])
    ref = PrefixRef("acme", "support")
    assert store.prefixes.resolve(ref, "other")
    store.erase_tenant("other")
    store.tenants.create("other")
    with pytest.raises(PrefixNotFound):
        store.prefixes.resolve(ref, "other")
    assert store.prefixes.page_shared("other") == []
    assert store.prefixes.resolve(ref, "third")
    (line,) = (line for line in store.audit.entries(tenant="acme") if line.action == "prefix.share")
    assert "other" not in line.target
    assert "third" in line.target
    invariants.check(backend)


def test_what_it_was_storing_meanwhile_is_given_up(store):
    """An upload whose file is written while its tenant is erased must not bring the tenant back."""
    put, put_file = store.blobs.put, store.blobs.put_file

    def erase_before(keep):
        def kept(*what):
            store.erase_tenant("acme")
            return keep(*what)

        return kept

    store.blobs.put, store.blobs.put_file = erase_before(put), erase_before(put_file)
    with pytest.raises(StoreUnavailable, match="try again"):
        store.prefixes.save("acme", "support", manifest(), tensors(manifest()))
    with pytest.raises(StoreUnavailable, match="try again"):
        store.jobs.submit("acme", "support", [{"prompt": "a", "completion": "b"}], {})
    found = invariants.records(store.backend)
    assert not any(found[folder] for folder in found if folder != "audit")
    assert store.collect() == 1  # the first was collected by the second erasing


def test_a_tenant_with_more_than_a_batch_is_erased_whole(store, backend, monkeypatch):
    monkeypatch.setattr(tenant_store, "BATCH", 7)
    version = publish(backend)

    def fill(transaction):
        for number in range(2, 41):
            path = f"acme/support/{number:09d}"
            transaction.put(f"version/{path}", dataclasses.replace(version, version=number).to_json())
            transaction.put(f"blob/{version.digest}/version/{path}", {})

    backend.write(fill)
    assert store.erase_tenant("acme") > 80
    assert not any(found for folder, found in invariants.records(backend).items() if folder != "audit")


@pytest.mark.parametrize("after", range(1, 12, 2))
def test_interrupted_it_is_finished_by_doing_it_again(store, backend, monkeypatch, after):
    monkeypatch.setattr(tenant_store, "BATCH", 3)
    plant(store, "acme")
    write, left = backend.write, [after]

    def write_until(work):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return write(work)

    monkeypatch.setattr(backend, "write", write_until)
    with pytest.raises(KeyboardInterrupt):
        store.erase_tenant("acme")
    monkeypatch.setattr(backend, "write", write)
    store.erase_tenant("acme")
    assert not any(found for folder, found in invariants.records(backend).items() if folder != "audit")
    assert list(store.blobs.digests()) == []


def test_it_is_gone_for_every_process_that_shares_the_store(store, url, clock):
    publish(store.backend)
    other = Store.open(url, clock=clock)
    assert other.prefixes.resolve(PrefixRef("acme", "support"))
    store.erase_tenant("acme")
    with pytest.raises(PrefixNotFound):
        other.prefixes.resolve(PrefixRef("acme", "support"))
    other.close()
