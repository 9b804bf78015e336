import pytest

from prefix_store.errors import PrefixNotFound
from prefix_store.prefix import PrefixRef
from tests.prefix_store.samples import enqueue, publish


def lines(store, **options):
    return [(line.tenant, line.action, line.target) for line in store.audit.entries(**options)]


def test_every_change_of_a_prefix_leaves_a_line(store, backend, clock):
    prefixes, by = store.prefixes, "key abcdefgh"
    ref = PrefixRef("acme", "support", 1)
    changes = [
        ("prefix.publish", "support@1", lambda: publish(backend)),
        ("prefix.publish", "support@2", lambda: publish(backend)),
        ("prefix.make_current", "support@1", lambda: prefixes.make_current("acme", "support", 1, by)),
        ("alias.set", "support@2 as live", lambda: prefixes.set_alias("acme", "support", "live", 2, by)),
        ("alias.remove", "support@live", lambda: prefixes.remove_alias("acme", "support", "live", by)),
        ("prefix.share", "support with *, other", lambda: prefixes.share("acme", "support", ["other", "*"], by)),
        ("prefix.share", "support with -", lambda: prefixes.share("acme", "support", [], by)),
        ("prefix.edit", "support@1", lambda: prefixes.edit(ref, {"pinned": False}, by)),
        ("prefix.delete", "support@1", lambda: prefixes.delete(ref, by=by)),
    ]
    for _, _, change in changes:
        change()
        clock.now += 1
    assert lines(store) == [("acme", action, target) for action, target, _ in changes]
    assert [line.at for line in store.audit.entries()] == [1000.0 + second for second in range(9)]
    assert {line.by for line in store.audit.entries() if line.action != "prefix.publish"} == {by}
    assert next(store.audit.entries()).digest == "a" * 64


def test_lines_of_one_moment_stay_in_order(store, clock):
    names = [f"tenant-{number % 7}-{number}" for number in range(30)]
    for name in names:
        store.tenants.create(name)
        clock.now += 0.00001 * (len(name) % 2)  # some within one microsecond, all within one millisecond
    assert [line.tenant for line in store.audit.entries()] == names


def test_jobs_and_tenants_leave_lines_too(store, backend):
    store.tenants.create("acme")
    store.tenants.set_quotas("acme", {"jobs": 3})
    job = store.jobs.submit("acme", "support", [{"prompt": "a", "completion": "b"}], {})
    store.jobs.request_cancel("acme", job.id)
    assert {action for _, action, _ in lines(store)} == {"tenant.create", "tenant.quotas", "job.submit", "job.cancel"}


def test_what_ends_by_itself_leaves_a_line(store, backend, clock):
    publish(backend, lifetime=60.0)
    clock.now += 61
    store.collect()
    assert lines(store, since=1061.0) == [("acme", "prefix.expire", "support@1")]


def test_what_failed_leaves_none(store, backend):
    enqueue(backend, "ftjob-1")
    for act in (
        lambda: store.prefixes.delete(PrefixRef("acme", "nothing")),
        lambda: store.prefixes.make_current("acme", "nothing", 1),
    ):
        with pytest.raises(PrefixNotFound):
            act()
    assert lines(store) == []


def test_lines_are_chosen_by_time_and_tenant(store, backend, clock):
    publish(backend)
    clock.now += 10
    publish(backend, tenant="other")
    clock.now += 10
    publish(backend)
    assert len(lines(store)) == 3
    assert len(lines(store, since=1010.0)) == 2
    assert lines(store, tenant="other") == [("other", "prefix.publish", "support@1")]
    assert lines(store, since=1020.001) == []
    assert lines(store, since=10.0**9) == []
