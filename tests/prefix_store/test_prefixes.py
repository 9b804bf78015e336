"""Prefixes with their files, on every kind of store."""

import pytest
import torch

from prefix_store import codec
from prefix_store.errors import (
    Conflict,
    InvalidName,
    InvalidPrefix,
    InvalidRequest,
    LeaseLost,
    PreconditionFailed,
    PrefixNotFound,
    QuotaExceeded,
    StoreCorrupt,
)
from prefix_store.prefix import Method, PrefixRef
from prefix_store.prefixes import LONGEST_LIFETIME
from tests.prefix_store.samples import damage, manifest, tensors

EXAMPLES = [{"prompt": "a", "completion": "b"}]


@pytest.fixture
def prefixes(store):
    return store.prefixes


def save(store, name="support", tenant="acme", seed=0, **options):
    return store.prefixes.save(tenant, name, manifest(), tensors(manifest(), seed), **options)


def ref(text, tenant="acme"):
    return PrefixRef.parse(text, tenant)


@pytest.mark.parametrize("method", Method)
def test_what_is_saved_is_read_back(prefixes, method):
    values = tensors(manifest(method))
    version = prefixes.save("acme", "support", manifest(method, base_digest="a" * 64), values)
    read, back = prefixes.read(version)
    assert read == manifest(method, base_digest="a" * 64)
    assert all(torch.equal(back[name], values[name]) for name in values)
    assert (version.method, version.base_digest) == (method, "a" * 64)
    with prefixes.file(version) as path:
        assert version.digest == codec.digest_of(path)
        assert version.size_bytes == path.stat().st_size


def test_references_resolve(store, prefixes):
    first, second = save(store), save(store, seed=1)
    prefixes.set_alias("acme", "support", "old", 1)
    assert prefixes.resolve(ref("support")) == second
    assert prefixes.resolve(ref("support@1")) == prefixes.resolve(ref("support@old")) == first
    assert prefixes.resolve(ref("acme/support", tenant="other")) == second


@pytest.mark.parametrize("text", ["other", "support@9", "support@prod", "foreign"])
def test_what_is_not_there_is_not_found(store, prefixes, text):
    save(store)
    save(store, "foreign", tenant="other")
    with pytest.raises(PrefixNotFound, match=f"^no prefix acme/{text}$"):
        prefixes.resolve(ref(text))
    assert prefixes.resolve(ref("support"))


def test_foreign_and_missing_are_told_apart_by_nothing_until_shared(store, prefixes):
    version = save(store)
    for text in ("acme/support", "acme/support@1", "acme/nothing"):
        with pytest.raises(PrefixNotFound, match=f"^no prefix {text}$"):
            prefixes.resolve(ref(text), reader="other")
    prefixes.share("acme", "support", ["other", "acme"])
    assert prefixes.describe(version).shared == ["other"]
    assert prefixes.read(prefixes.resolve(ref("acme/support"), reader="other"))
    assert prefixes.page_shared("other") == [version]
    prefixes.share("acme", "support", [])
    with pytest.raises(PrefixNotFound):
        prefixes.resolve(ref("acme/support"), reader="other")


def test_deleting(store, prefixes):
    versions = [save(store, seed=seed) for seed in range(3)]
    assert prefixes.delete(ref("support@3")) == versions[2:]
    assert prefixes.resolve(ref("support")) == versions[1]
    assert prefixes.delete(ref("support")) == versions[:2]
    assert prefixes.ever_published("acme", "support")
    assert prefixes.page("acme") == []
    with pytest.raises(PrefixNotFound):
        prefixes.describe(versions[0])


def test_pages(store, prefixes):
    for name in ["b", "a", "c"]:
        save(store, name)
    assert [version.name for version in prefixes.page("acme", limit=2)] == ["a", "b"]
    assert [version.name for version in prefixes.page("acme", after="b")] == ["c"]


@pytest.mark.parametrize(("tenant", "name"), [("acme", "Support"), ("acme", ""), ("../x", "support"), ("", "support")])
def test_illegal_names_are_refused(store, tenant, name):
    with pytest.raises(InvalidName):
        save(store, name, tenant)


@pytest.mark.parametrize("alias", ["", "3", "-x", "A", "a" * 65, "a/b", "a\n"])
def test_illegal_aliases_are_refused(store, prefixes, alias):
    save(store)
    with pytest.raises(InvalidName):
        prefixes.set_alias("acme", "support", alias, 1)


def test_sharing_with_somebody_impossible_is_refused(store, prefixes):
    version = save(store)
    with pytest.raises(InvalidName):
        prefixes.share("acme", "support", ["other", "a/b"])
    assert prefixes.describe(version).shared == []


def test_unsound_tensors_are_not_saved(store, prefixes):
    with pytest.raises(InvalidPrefix):
        prefixes.save("acme", "support", manifest(), {"self.kv": torch.full((2, 2, 2, 5, 3), torch.nan)})
    assert not prefixes.ever_published("acme", "support")


@pytest.mark.parametrize("lifetime", [0.0, -1.0, float("nan"), float("inf"), LONGEST_LIFETIME + 1])
def test_lifetimes_of_no_use_are_refused(store, prefixes, lifetime):
    version = save(store)
    for act in (lambda: save(store, lifetime=lifetime), lambda: prefixes.edit(version.ref, {"lifetime": lifetime})):
        with pytest.raises(InvalidRequest, match="lifetime"):
            act()


@pytest.mark.parametrize(
    "notes", [{"a": 1}, {"": "a"}, {"a" * 65: ""}, {"a": "b" * 513}, {str(n): "" for n in range(17)}, {"a": "\ud800"}]
)
def test_notes_of_no_use_are_refused(store, prefixes, notes):
    version = save(store)
    for act in (lambda: save(store, metadata=notes), lambda: prefixes.edit(version.ref, {"metadata": notes})):
        with pytest.raises(InvalidRequest, match="metadata"):
            act()


def test_what_may_change_of_a_version_is_changed_and_nothing_else(store, prefixes, clock):
    version = save(store, metadata={"a": "b"}, lifetime=60.0)
    assert (version.metadata, version.expires_at, version.pinned) == ({"a": "b"}, 1060.0, False)
    clock.now += 10
    changed = prefixes.edit(version.ref, {"pinned": True, "lifetime": 100.0})
    assert (changed.metadata, changed.expires_at, changed.pinned) == ({"a": "b"}, 1110.0, True)
    assert (changed.digest, changed.created_at) == (version.digest, 1000.0)
    assert prefixes.edit(version.ref, {"lifetime": None, "metadata": {}}).expires_at is None
    assert prefixes.resolve(version.ref).metadata == {}
    with pytest.raises(PrefixNotFound):
        prefixes.edit(ref("nothing"), {"pinned": True})


def test_conditions_and_bounds_reach_the_caller_and_leave_no_file(store, prefixes, clock):
    version = save(store)
    store.tenants.create("acme")
    store.tenants.set_quotas("acme", {"prefixes": 1})
    for error, act in [
        (PreconditionFailed, lambda: save(store, seed=1, if_match="0" * 64)),
        (PreconditionFailed, lambda: prefixes.delete(version.ref, if_match="0" * 64)),
        (QuotaExceeded, lambda: save(store, "other", seed=2)),
    ]:
        with pytest.raises(error):
            act()
    store.collect()
    assert list(store.blobs.digests()) == [version.digest]
    assert save(store, seed=1, if_match=version.digest).version == 2


def test_damage_is_noticed_when_reading(store, prefixes):
    version = save(store)
    damage(store, version.digest, b"no prefix")
    with pytest.raises(StoreCorrupt):
        prefixes.read(version)


def test_a_version_that_was_deleted_and_collected_is_not_found_rather_than_corrupt(store, prefixes, clock):
    version, kept = save(store), save(store, seed=1)
    prefixes.delete(version.ref)
    assert prefixes.read(version)
    clock.now += 2 * 3600
    assert store.collect() == 1
    with pytest.raises(PrefixNotFound):
        prefixes.read(version)
    damage(store, kept.digest, None)
    with pytest.raises(StoreCorrupt):
        prefixes.read(kept)


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


def test_pinned_and_aliased_versions_stay(store, prefixes):
    save(store)
    save(store, seed=1)
    prefixes.edit(ref("support@1"), {"pinned": True})
    prefixes.set_alias("acme", "support", "live", 2)
    for text in ("support", "support@1", "support@2"):
        with pytest.raises(Conflict):
            prefixes.delete(ref(text))
    prefixes.edit(ref("support@1"), {"pinned": False})
    prefixes.remove_alias("acme", "support", "live")
    assert len(prefixes.delete(ref("support"))) == 2
