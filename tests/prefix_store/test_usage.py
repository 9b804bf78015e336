import pytest

from prefix_store.errors import Conflict
from prefix_store.jobs import JobStatus
from prefix_store.prefix import PrefixRef
from prefix_store.tenants import Usage
from tests.prefix_store import invariants
from tests.prefix_store.samples import enqueue, publish


def test_a_tenant_without_anything_has_nothing(store):
    assert store.tenants.usage("acme") == Usage()


def test_names_versions_and_bytes_are_counted_as_they_come_and_go(store, backend):
    for name in ("a", "a", "b"):
        publish(backend, name)
    publish(backend, "a", tenant="other")
    assert store.tenants.usage("acme") == Usage(prefixes=2, versions=3, bytes=30)
    store.prefixes.delete(PrefixRef("acme", "a", 1))
    assert store.tenants.usage("acme") == Usage(prefixes=2, versions=2, bytes=20)
    store.prefixes.delete(PrefixRef("acme", "a"))
    assert store.tenants.usage("acme") == Usage(prefixes=1, versions=1, bytes=10)
    assert store.tenants.usage("other") == Usage(prefixes=1, versions=1, bytes=10)
    invariants.check(backend)


def test_what_has_ended_is_no_longer_counted_once_it_is_collected(store, backend, clock):
    publish(backend, lifetime=60.0)
    clock.now += 61
    assert store.tenants.usage("acme").versions == 1
    store.collect()
    assert store.tenants.usage("acme") == Usage()


def test_jobs_are_counted_by_where_they_stand(store, backend):
    enqueue(backend, "ftjob-1", "ftjob-2")
    job = store.jobs.claim("w", 60.0)
    usage = store.tenants.usage("acme")
    assert (usage.last_job, usage.jobs[JobStatus.QUEUED], usage.jobs[JobStatus.RUNNING]) == (2, 1, 1)
    publish(backend, job=job)
    usage = store.tenants.usage("acme")
    assert (usage.jobs[JobStatus.SUCCEEDED], usage.jobs[JobStatus.RUNNING]) == (1, 0)
    invariants.check(backend)


def test_what_is_refused_is_not_counted(store, backend):
    publish(backend)
    store.prefixes.edit(PrefixRef("acme", "support"), {"pinned": True})
    before = store.tenants.usage("acme")
    with pytest.raises(Conflict):
        store.prefixes.delete(PrefixRef("acme", "support"))
    assert store.tenants.usage("acme") == before
