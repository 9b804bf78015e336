"""A store that an earlier antefix wrote, kept beside the tests, opens and works."""

import shutil
import sqlite3
from pathlib import Path

import pytest

from prefix_store.backends import schema1
from prefix_store.errors import Conflict, LeaseLost, PrefixNotFound, Unauthorized
from prefix_store.jobs import JobStatus
from prefix_store.prefix import PrefixRef
from prefix_store.store import Store
from tests.prefix_store import invariants
from tests.prefix_store.samples import Clock, manifest, tensors

FIXTURE = Path(__file__).parents[1] / "fixtures" / "schema1"
KEY = "afx_gonfx9ly_c_sMBX7-kQnOtmAgK6gNpyh5XBhH1vdZmelUjhcb_1o"


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(FIXTURE, tmp_path / "old")
    return tmp_path / "old"


@pytest.fixture
def store(folder):
    opened = Store.open(f"sqlite:///{folder}/store.db", clock=Clock(2e9))
    yield opened
    opened.close()


def rows(path, query):
    with sqlite3.connect(path) as db:
        found = db.execute(query).fetchall()
    db.close()
    return found


def test_the_fixture_is_as_it_was_written(folder):
    assert rows(folder / "store.db", "PRAGMA user_version") == [(1,)]
    assert len(rows(folder / "store.db", "SELECT * FROM jobs")) == 5


def test_opening_upgrades_the_file_once(store, folder):
    tables = "SELECT name FROM sqlite_master WHERE type = 'table'"
    assert rows(folder / "store.db", tables) == [("records",)]
    assert rows(folder / "store.db", "PRAGMA user_version") == [(2,)]
    before = invariants.records(store.backend)
    again = Store.open(f"sqlite:///{folder}/store.db")
    assert invariants.records(again.backend) == before
    again.close()


def test_nothing_is_missing_or_out_of_step(store):
    invariants.check(store.backend)
    invariants.check_whole(store)
    listed = {
        tenant: [(version.name, version.version) for version in store.prefixes.page(tenant)]
        for tenant in ("acme", "beta")
    }
    assert listed == {"acme": [("sales", 1), ("support", 3), ("trained", 1)], "beta": [("support", 1)]}
    assert [version.version for version in store.prefixes.versions("acme", "support")] == [1, 3]
    assert store.prefixes.ever_published("acme", "gone")
    assert not store.prefixes.ever_published("beta", "gone")


def test_what_follows_goes_on_from_what_was(store):
    for tenant, name, last in (("acme", "support", 3), ("acme", "gone", None)):
        saved = store.prefixes.save(tenant, name, manifest(), tensors(manifest(), 7))
        assert saved.version > (last or 1)
    with pytest.raises(PrefixNotFound):
        store.prefixes.resolve(PrefixRef("acme", "support", 2))
    store.prefixes.make_current("acme", "support", 1)
    store.prefixes.set_alias("acme", "support", "old", 1)
    with pytest.raises(Conflict):
        store.prefixes.delete(PrefixRef("acme", "support", 1))
    store.prefixes.edit(PrefixRef("acme", "support", 3), {"metadata": {"a": "b"}, "lifetime": 5.0})
    invariants.check(store.backend)


def test_jobs_stand_where_they_stood_and_go_on(store):
    jobs = [job for tenant in ("acme", "beta") for job in store.jobs.jobs(tenant, None, 10)]
    assert len(jobs) == len({job.status for job in jobs}) == 5
    assert sum(store.jobs.job_counts().values()) == 5
    published = next(job for job in jobs if job.status is JobStatus.SUCCEEDED)
    version = store.prefixes.resolve(PrefixRef(published.tenant, published.name, published.version))
    assert version.job_id == published.id
    running = next(job for job in jobs if job.status is JobStatus.RUNNING)
    waiting = next(job for job in jobs if job.status is JobStatus.QUEUED)
    assert store.jobs.examples(waiting)
    claimed = [store.jobs.claim("w", 60.0) for _ in range(3)]
    assert {job.id for job in claimed if job is not None} == {running.id, waiting.id}  # its lease has long lapsed
    with pytest.raises(LeaseLost):
        store.jobs.heartbeat(running, 60.0, {})
    for job in claimed[:2]:
        store.prefixes.save(job.tenant, job.name, manifest(), tensors(manifest(), 8), job=job)
    newest = store.jobs.submit("acme", "support", [{"prompt": "a", "completion": "b"}], {})
    assert store.jobs.jobs("acme", None, 1) == [newest]
    events = [store.jobs.events(job.tenant, job.id, 0, 100) for job in jobs]
    assert any(events)
    assert all([event.sequence for event in found] == list(range(1, len(found) + 1)) for found in events)
    invariants.check(store.backend)


def test_keys_are_good(store):
    key = store.keys.authenticate(KEY)
    assert key.expires_at is None
    assert len(store.keys.all()) == 2
    assert key.tenant in [tenant.name for tenant in store.tenants.all()]
    store.keys.rotate(key.id, overlap=0.0)
    with pytest.raises(Unauthorized):
        store.keys.authenticate(KEY)


def test_nothing_of_it_is_collected_but_what_nobody_names(store):
    named = {key.partition("/")[0] for key in invariants.records(store.backend)["blob"]}
    store.collect()
    assert set(store.blobs.digests()) == named
    invariants.check_whole(store)


def test_an_upgrade_that_is_cut_off_leaves_the_old_store(folder, monkeypatch):
    def die(db):
        db.execute("DROP TABLE keys")
        raise KeyboardInterrupt

    monkeypatch.setattr(schema1, "convert", die)
    with pytest.raises(KeyboardInterrupt):
        Store.open(f"sqlite:///{folder}/store.db")
    monkeypatch.undo()
    assert rows(folder / "store.db", "PRAGMA user_version") == [(1,)]
    store = Store.open(f"sqlite:///{folder}/store.db")
    assert store.keys.authenticate(KEY)
    store.close()


def test_a_record_with_fields_of_a_later_version_is_read(store):
    version = store.prefixes.resolve(PrefixRef("acme", "support", 1))
    path = f"version/acme/support/{1:09d}"
    store.backend.write(lambda transaction: transaction.put(path, {**transaction.get(path), "later": 1}))
    assert store.prefixes.resolve(version.ref) == version
