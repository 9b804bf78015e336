"""The records of prefixes, on every backend."""

import dataclasses

import pytest

from prefix_store import holds, layout
from prefix_store.catalog import PAGE, Catalog
from prefix_store.errors import (
    Conflict,
    InvalidRequest,
    LeaseLost,
    PreconditionFailed,
    PrefixNotFound,
    QuotaExceeded,
    StoreCorrupt,
    StoreUnavailable,
)
from prefix_store.job_queue import JobQueue
from prefix_store.jobs import JobError, JobStatus
from prefix_store.name_records import Draft
from prefix_store.prefix import Method, PrefixRef
from tests.prefix_store import invariants
from tests.prefix_store.samples import enqueue, manifest, publish

LEASE = 60.0
BY = "key abcdefgh"


@pytest.fixture
def catalog(backend):
    return Catalog(backend)


@pytest.fixture
def queue(backend):
    return JobQueue(backend)


@pytest.fixture(autouse=True)
def _sound(backend):
    yield
    try:
        backend.ping()
    except StoreUnavailable:
        return
    invariants.check(backend)


def find(catalog, text, reader="acme", tenant="acme"):
    return catalog.find(PrefixRef.parse(text, tenant), reader)


def delete(catalog, text, if_match=None):
    return catalog.delete(PrefixRef.parse(text, "acme"), if_match, BY)


def numbers(versions):
    return [(version.name, version.version) for version in versions]


# publishing and finding


def test_versions_count_from_one_and_the_last_is_current(backend, catalog, clock):
    first = publish(backend)
    clock.now += 5
    second = publish(backend, digest="b")
    assert (first.version, second.version) == (1, 2)
    assert (second.created_at, second.digest, second.size_bytes) == (1005.0, "b" * 64, 10)
    assert (second.method, second.virtual_tokens, second.job_id) == (Method.PREFIX, 5, None)
    assert find(catalog, "support") == second
    assert find(catalog, "support@1") == first


@pytest.mark.parametrize("text", ["support@2", "support@live", "other", "other/support"])
def test_what_is_not_there_is_none(backend, catalog, text):
    publish(backend)
    assert find(catalog, text) is None


def test_pages_hold_current_versions_in_name_order(backend, catalog):
    for name in ["c", "a", "b", "a", "a-b", "a.b"]:
        publish(backend, name)
    publish(backend, "foreign", tenant="other")
    assert numbers(catalog.page("acme", "", 4)) == [("a", 2), ("a-b", 1), ("a.b", 1), ("b", 1)]
    assert numbers(catalog.page("acme", "b", 2)) == [("c", 1)]
    assert numbers(catalog.page("acme", "", 10, lambda version: version.version == 2)) == [("a", 2)]


def test_a_page_is_filled_however_few_are_wanted(backend, catalog):
    count = PAGE + 5

    def fill(transaction):
        for number in range(count):
            version = dataclasses.replace(one, name=f"n{number:04d}")
            transaction.put(f"name/acme/{version.name}", {"last": 1, "current": 1})
            transaction.put(f"version/acme/{version.name}/000000001", version.to_json())
            transaction.put(f"blob/{one.digest}/version/acme/{version.name}/000000001", {})
        transaction.put("usage/acme", {"prefixes": count + 1, "versions": count + 1, "bytes": 10 * (count + 1)})

    one = publish(backend, "a")
    backend.write(fill)
    last = f"n{count - 1:04d}"
    assert numbers(catalog.page("acme", "", 5, lambda version: version.name == last)) == [(last, 1)]


def test_versions_are_listed_in_order(backend, catalog):
    for digest in "abc":
        publish(backend, digest=digest)
    publish(backend, "support-2")
    delete(catalog, "support@2")
    assert [version.version for version in catalog.versions("acme", "support", 0, 10)] == [1, 3]
    assert [version.version for version in catalog.versions("acme", "support", 1, 10)] == [3]
    assert [version.version for version in catalog.versions("acme", "support", 0, 1)] == [1]


def test_a_hold_that_is_gone_publishes_nothing(backend, catalog):
    with holds.held(backend, "acme", "a" * 64) as hold:
        backend.write(lambda transaction: transaction.delete(hold))
        with pytest.raises(StoreUnavailable, match="try again"):
            catalog.publish("acme", "support", Draft(manifest(), "a" * 64, 10, hold), None, None, BY)
    assert find(catalog, "support") is None


# deleting


def test_deleting_the_current_version_uncovers_the_one_below(backend, catalog):
    for _ in range(3):
        publish(backend)
    assert numbers(delete(catalog, "support@3")) == [("support", 3)]
    assert find(catalog, "support").version == 2
    assert numbers(delete(catalog, "support@1")) == [("support", 1)]
    assert numbers(catalog.page("acme", "", 10)) == [("support", 2)]


def test_version_numbers_are_never_used_again(backend, catalog):
    publish(backend)
    publish(backend)
    delete(catalog, "support@2")
    assert publish(backend).version == 3
    assert numbers(delete(catalog, "support")) == [("support", 1), ("support", 3)]
    assert find(catalog, "support") is None
    assert publish(backend).version == 4


@pytest.mark.parametrize("text", ["other/support", "support@9", "nothing", "other/support@1"])
def test_deleting_what_is_not_there_is_not_found(backend, catalog, text):
    publish(backend)
    with pytest.raises(PrefixNotFound, match=r"^no prefix "):
        delete(catalog, text)
    assert find(catalog, "support").version == 1


def test_an_alias_is_no_way_to_delete(backend, catalog):
    publish(backend)
    catalog.set_alias("acme", "support", "live", 1, BY)
    with pytest.raises(InvalidRequest, match="by its number"):
        delete(catalog, "support@live")


def test_a_name_is_remembered_after_its_versions_are_gone(backend, catalog):
    assert not catalog.ever_published("acme", "support")
    publish(backend)
    delete(catalog, "support")
    assert catalog.ever_published("acme", "support")
    assert not catalog.ever_published("other", "support")


def test_what_is_pinned_is_not_deleted(backend, catalog):
    publish(backend)
    publish(backend)
    catalog.edit(PrefixRef("acme", "support", 1), lambda version, now: dataclasses.replace(version, pinned=True), BY)
    for text in ("support", "support@1"):
        with pytest.raises(Conflict, match="support@1 is pinned"):
            delete(catalog, text)
    delete(catalog, "support@2")
    catalog.edit(PrefixRef("acme", "support", 1), lambda version, now: dataclasses.replace(version, pinned=False), BY)
    delete(catalog, "support")


# the version that is current, and aliases


def test_the_current_version_can_be_switched_back_and_forth(backend, catalog):
    first, second = publish(backend), publish(backend, digest="b")
    assert catalog.make_current("acme", "support", 1, BY) == first
    assert find(catalog, "support") == first
    assert catalog.page("acme", "", 10) == [first]
    assert publish(backend, digest="c").version == 3
    assert find(catalog, "support").version == 3
    assert catalog.make_current("acme", "support", 2, BY) == second
    delete(catalog, "support@1")
    assert find(catalog, "support") == second
    for number in (1, 4):
        with pytest.raises(PrefixNotFound):
            catalog.make_current("acme", "support", number, BY)


def test_an_alias_means_a_version_until_it_is_moved_or_removed(backend, catalog):
    first, second = publish(backend), publish(backend, digest="b")
    catalog.set_alias("acme", "support", "live", 1, BY)
    assert find(catalog, "support@live") == first
    assert find(catalog, "support") == second
    catalog.set_alias("acme", "support", "live", 2, BY)
    catalog.set_alias("acme", "support", "next", 2, BY)
    assert find(catalog, "support@live") == find(catalog, "support@next") == second
    assert catalog.name("acme", "support").aliases_of(2) == ["live", "next"]
    catalog.remove_alias("acme", "support", "live", BY)
    assert find(catalog, "support@live") is None
    for act in (lambda: catalog.remove_alias("acme", "support", "live", BY), lambda: find_or_fail(catalog)):
        with pytest.raises(PrefixNotFound):
            act()


def find_or_fail(catalog):
    catalog.set_alias("acme", "support", "live", 3, BY)


def test_what_an_alias_means_is_deleted_only_with_the_name(backend, catalog):
    publish(backend)
    publish(backend)
    catalog.set_alias("acme", "support", "live", 1, BY)
    with pytest.raises(Conflict, match="has the alias live"):
        delete(catalog, "support@1")
    assert numbers(delete(catalog, "support")) == [("support", 1), ("support", 2)]
    publish(backend)
    assert find(catalog, "support@live") is None


# conditions and bounds


def test_a_condition_on_the_current_version_is_kept(backend, catalog):
    for condition in ("a" * 64, "*"):
        with pytest.raises(PreconditionFailed, match="does not exist"):
            publish(backend, if_match=condition)
    publish(backend)
    assert publish(backend, digest="b", if_match="a" * 64).version == 2
    assert publish(backend, digest="c", if_match="*").version == 3
    with pytest.raises(PreconditionFailed, match=f"is now {'c' * 64}"):
        publish(backend, digest="d", if_match="b" * 64)
    with pytest.raises(PreconditionFailed):
        delete(catalog, "support", if_match="a" * 64)
    assert numbers(delete(catalog, "support@1", if_match="a" * 64)) == [("support", 1)]
    assert numbers(delete(catalog, "support", if_match="c" * 64)) == [("support", 2), ("support", 3)]


def test_quotas_bound_names_and_bytes(store, backend, catalog):
    store.tenants.create("acme")
    store.tenants.set_quotas("acme", {"prefixes": 2, "bytes": 35})
    publish(backend, "a")
    publish(backend, "b")
    with pytest.raises(QuotaExceeded, match="may have 2 prefixes; this would make it 3"):
        publish(backend, "c")
    assert publish(backend, "a").version == 2
    with pytest.raises(QuotaExceeded, match="may have 35 bytes; this would make it 40"):
        publish(backend, "a")
    assert publish(backend, "c", tenant="other").version == 1
    delete(catalog, "a")
    assert publish(backend, "c").version == 1


def test_a_tenant_over_a_quota_that_was_lowered_may_still_take_away(store, backend, catalog):
    publish(backend, "a")
    publish(backend, "b")
    store.tenants.create("acme")
    store.tenants.set_quotas("acme", {"prefixes": 0, "bytes": 0})
    delete(catalog, "a")
    with pytest.raises(QuotaExceeded):
        publish(backend, "b")


# notes and ends


def test_notes_come_with_a_version_and_can_be_changed(backend, catalog):
    version = publish(backend, metadata={"for": "Grüße"})
    assert find(catalog, "support").metadata == {"for": "Grüße"}
    changed = catalog.edit(
        PrefixRef("acme", "support"), lambda old, now: dataclasses.replace(old, metadata={"at": str(now)}), BY
    )
    assert changed == find(catalog, "support@1") == dataclasses.replace(version, metadata={"at": "1000.0"})
    with pytest.raises(PrefixNotFound):
        catalog.edit(PrefixRef("acme", "support", 2), lambda old, now: old, BY)


def test_a_version_ends_when_its_time_is_up(backend, catalog, clock):
    publish(backend)
    publish(backend, digest="b", lifetime=60.0)
    clock.now += 59.9
    assert find(catalog, "support").expires_at == 1060.0
    clock.now += 0.1
    assert find(catalog, "support@2") is None
    assert find(catalog, "support") == find(catalog, "support@1")
    assert [version.version for version in catalog.page("acme", "", 10)] == [1]


def test_what_is_pinned_does_not_end(backend, catalog, clock):
    publish(backend, lifetime=60.0)
    catalog.edit(PrefixRef("acme", "support"), lambda version, now: dataclasses.replace(version, pinned=True), BY)
    clock.now += 100
    assert find(catalog, "support").pinned


# sharing


def test_a_foreign_name_is_missing_until_it_is_shared(backend, catalog):
    version = publish(backend)
    assert find(catalog, "acme/support", reader="other") is None
    catalog.share("acme", "support", {"other"}, BY)
    assert find(catalog, "acme/support", reader="other") == version
    assert find(catalog, "acme/support@1", reader="other") == version
    assert find(catalog, "acme/support", reader="third") is None
    assert find(catalog, "acme/support-2", reader="other") is None
    catalog.share("acme", "support", {"*"}, BY)
    assert find(catalog, "acme/support", reader="third") == version
    catalog.share("acme", "support", set(), BY)
    assert find(catalog, "acme/support", reader="other") is None
    with pytest.raises(PrefixNotFound):
        catalog.share("acme", "nothing", {"other"}, BY)


def test_what_is_shared_is_listed_in_order_without_gaps(backend, catalog):
    """However it was shared, and also where one tenant's name begins with another's."""
    offers = [("b", "x"), ("a-b", "x"), ("a", "y"), ("a", "z"), ("a.b", "x"), ("me", "x")]
    for number, (tenant, name) in enumerate(offers):
        publish(backend, name, tenant)
        catalog.share(tenant, name, {("me", "*")[number % 2], "else"}, BY)
    publish(backend, "secret", "a")
    expected = sorted(f"{tenant}/{name}" for tenant, name in offers if tenant != "me")
    listed, after = [], ""
    while page := catalog.page_shared("me", after, 2):
        listed += [f"{version.tenant}/{version.name}" for version in page]
        after = listed[-1]
    assert listed == expected
    delete(catalog, "a/y")
    assert "a/y" not in [f"{version.tenant}/{version.name}" for version in catalog.page_shared("me", "", 9)]


def test_a_share_ends_with_the_name(backend, catalog):
    publish(backend)
    catalog.share("acme", "support", {"other"}, BY)
    delete(catalog, "support")
    publish(backend)
    assert find(catalog, "acme/support", reader="other") is None
    assert catalog.page_shared("other", "", 9) == []


# publishing a job's result


def test_publishing_ends_the_job(backend, queue, store, clock):
    enqueue(backend, "ftjob-1")
    job = queue.claim("w", LEASE)
    clock.now += 7
    version = publish(backend, job=job)
    ended = store.jobs.job("acme", "ftjob-1")
    assert version.job_id == "ftjob-1"
    assert (ended.status, ended.version, ended.finished_at) == (JobStatus.SUCCEEDED, 1, 1007.0)
    assert ended.lease_until is None


def test_publishing_a_job_twice_is_publishing_it_once(backend, catalog, queue):
    enqueue(backend, "ftjob-1")
    job = queue.claim("w", LEASE)
    first = publish(backend, job=job)
    publish(backend)
    assert publish(backend, job=job) == first
    assert find(catalog, "support").version == 2
    assert not any("/hold/" in key for key in invariants.records(backend)["blob"])
    delete(catalog, "support@1")
    with pytest.raises(LeaseLost, match="deleted since"):
        publish(backend, job=job)


def test_only_the_last_claimant_may_publish(backend, catalog, queue, clock):
    enqueue(backend, "ftjob-1")
    stale = queue.claim("w1", LEASE)
    clock.now += LEASE
    fresh = queue.claim("w2", LEASE)
    with pytest.raises(LeaseLost):
        publish(backend, job=stale)
    assert not catalog.ever_published("acme", "support")
    assert publish(backend, job=fresh).version == 1


def test_a_job_that_has_ended_publishes_nothing(backend, catalog, queue):
    enqueue(backend, "ftjob-1")
    job = queue.claim("w", LEASE)
    queue.finish(job, JobStatus.FAILED, JobError("oom", "out of memory"))
    with pytest.raises(LeaseLost):
        publish(backend, job=job)
    assert not catalog.ever_published("acme", "support")


def test_a_name_whose_version_is_missing_is_corrupt_and_answers_at_once(backend, catalog):
    version = publish(backend)
    key = layout.version("acme", "support", version.version)
    kept = version.to_json()
    backend.write(lambda transaction: transaction.delete(key))
    with pytest.raises(StoreCorrupt, match="acme/support means version 1, which is missing"):
        catalog.find(PrefixRef("acme", "support"), "acme")
    backend.write(lambda transaction: transaction.put(key, kept))


def test_the_only_version_is_not_deleted_by_number_while_it_has_an_alias(backend, catalog):
    publish(backend)
    catalog.set_alias("acme", "support", "live", 1, BY)
    with pytest.raises(Conflict, match="alias live"):
        catalog.delete(PrefixRef("acme", "support", 1), None, BY)
    assert len(catalog.delete(PrefixRef("acme", "support"), None, BY)) == 1
