"""A random walk over everything that can be done, on two kinds of store at once.

Both must answer alike at every step and hold the same records in the end, and what must always hold, holds throughout.
"""

import itertools
import random

import pytest

from prefix_store.errors import AntefixError
from prefix_store.jobs import JobStatus
from prefix_store.migration import fingerprint
from prefix_store.prefix import PrefixRef
from prefix_store.store import Store
from tests.prefix_store import invariants
from tests.prefix_store.samples import Clock, enqueue, publish

TENANTS, NAMES, ALIASES = ["acme", "acme-2", "beta"], ["a", "a-b"], ["live", "next"]
STEPS, CHECK_EVERY = 120, 10


class Walk:
    """Draws one deed after another; `ids` numbers the jobs."""

    def __init__(self, seed: int) -> None:
        self._draws = random.Random(seed)
        self._ids = itertools.count()
        self._claimed: dict[int, list] = {}

    def deed(self):
        """A function of a store."""
        draw = self._draws
        tenant, name, number = draw.choice(TENANTS), draw.choice(NAMES), draw.randint(1, 4)
        alias, digest = draw.choice(ALIASES), draw.choice("abcd")
        ref = draw.choice(
            [PrefixRef(tenant, name), PrefixRef(tenant, name, number), PrefixRef(tenant, name, None, alias)]
        )
        reader = draw.choice(TENANTS)
        options = draw.choice([{}, {"lifetime": 30.0}, {"if_match": digest * 64}, {"metadata": {"a": digest}}])
        change = draw.choice([{"pinned": True}, {"pinned": False}, {"lifetime": 20.0}, {"lifetime": None}])
        readers = draw.sample([*TENANTS, "*"], draw.randint(0, 2))
        job_id = f"ftjob-{next(self._ids)}"
        status = draw.choice([status for status in JobStatus if status is not JobStatus.SUCCEEDED])
        quota = {draw.choice(["prefixes", "bytes", "jobs"]): draw.choice([None, None, 2, 60])}
        chosen = draw.random()
        deeds = [
            (8, lambda store: publish(store.backend, name, tenant, digest, **options)),
            (3, lambda store: store.prefixes.delete(ref)),
            (2, lambda store: store.prefixes.make_current(tenant, name, number)),
            (3, lambda store: store.prefixes.set_alias(tenant, name, alias, number)),
            (1, lambda store: store.prefixes.remove_alias(tenant, name, alias)),
            (3, lambda store: store.prefixes.edit(ref, change)),
            (2, lambda store: store.prefixes.share(tenant, name, readers)),
            (4, lambda store: store.prefixes.resolve(ref, reader)),
            (2, lambda store: store.prefixes.page(tenant, name[:1], 2)),
            (2, lambda store: store.prefixes.page_shared(reader, "", 3)),
            (2, lambda store: store.prefixes.versions(tenant, name, number)),
            (3, lambda store: enqueue(store.backend, job_id, tenant=tenant)),
            (3, lambda store: self._claims(store).append(store.jobs.claim("w", 15.0)) or self._claims(store)[-1]),
            (2, lambda store: store.jobs.heartbeat(self._job(store, chosen), 15.0, {"step": number})),
            (2, lambda store: store.jobs.add_event(self._job(store, chosen), "message", {"n": number})),
            (2, lambda store: publish(store.backend, name, tenant, digest, self._job(store, chosen))),
            (2, lambda store: store.jobs.finish(self._job(store, chosen), status, None)),
            (1, lambda store: store.jobs.make_way(self._job(store, chosen))),
            (1, lambda store: store.jobs.request_cancel(tenant, self._job(store, chosen).id)),
            (1, lambda store: store.jobs.request_pause(tenant, self._job(store, chosen).id)),
            (1, lambda store: store.jobs.resume(tenant, self._job(store, chosen).id)),
            (2, lambda store: store.jobs.save_checkpoint(self._job(store, chosen), bytes([number]))),
            (2, lambda store: [store.jobs.jobs(tenant, None, 3), store.jobs.job_counts()]),
            (1, lambda store: store.tenants.create(tenant)),
            (1, lambda store: store.tenants.set_quotas(tenant, quota)),
            (1, lambda store: store.tenants.usage(tenant)),
            (1, lambda store: store.collect()),
            (0.3, lambda store: store.tenants.erase(tenant)),
        ]
        weights, acts = zip(*deeds, strict=True)
        return draw.choices(acts, weights)[0]

    def pause(self) -> float:
        return self._draws.choice([0.0, 0.5, 7.0])

    def _claims(self, store):
        return self._claimed.setdefault(id(store), [])

    def _job(self, store, chosen):
        """One that was claimed at some time, perhaps long lost."""
        jobs = [job for job in self._claims(store) if job is not None]
        if not jobs:
            raise AntefixError("nothing was claimed yet")
        return jobs[int(chosen * len(jobs))]


def outcome(deed, store):
    try:
        return deed(store)
    except AntefixError as error:
        return type(error).__name__, error.message


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["redis", pytest.param("valkey", marks=pytest.mark.slow)])
def test_two_kinds_of_store_are_the_same_at_every_step(kind, servers, tmp_path, seed):
    clock, walk = Clock(), Walk(seed)
    embedded = Store.open(f"sqlite:///{tmp_path}/store.db", clock=clock)
    served = Store.open(servers(kind).url, clock=clock)
    failed = 0
    for step in range(STEPS):
        clock.now += walk.pause()
        deed = walk.deed()
        expected, got = outcome(deed, embedded), outcome(deed, served)
        assert got == expected, f"step {step}"
        failed += isinstance(expected, tuple)
        if step % CHECK_EVERY == 0:
            invariants.check(embedded.backend)
    invariants.check(served.backend)
    assert contents(embedded) == contents(served)
    assert 0 < failed < 0.8 * STEPS
    for store in (embedded, served):
        store.close()


def contents(store):
    """The records; of the audit log the lines alone, for their ids are drawn at random."""
    found = invariants.records(store.backend)
    trail = sorted(str(sorted(line.items(), key=str)) for line in found.pop("audit").values())
    return found, trail


def test_the_same_records_have_the_same_fingerprint(servers, tmp_path):
    stores = [Store.open(url, clock=Clock()) for url in (f"sqlite:///{tmp_path}/store.db", servers("redis").url)]
    for store in stores:
        store.backend.write(lambda transaction: transaction.put("usage/acme", {"versions": 1, "note": "é\ud800"}))
    assert len({fingerprint(store) for store in stores}) == 1
    stores[1].backend.write(lambda transaction: transaction.put("usage/acme", {"versions": 2}))
    assert len({fingerprint(store) for store in stores}) == 2
    for store in stores:
        store.close()
