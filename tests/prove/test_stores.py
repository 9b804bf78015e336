"""Small samples of the proofs about the store, and whether their judges see what is wrong."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from prefix_store.store import Store
from tests.prefix_store.samples import publish
from tests.prove import concurrent_store, kill_store, store_costs
from tests.prove.kill_store import Ledger
from tests.prove.stores import at_hand, place


@pytest.fixture(params=["sqlite", "redis", pytest.param("valkey", marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param not in at_hand():
        pytest.skip(f"no package brings a {request.param} server for this machine")
    name: str = request.param
    return name


def test_a_sample_of_the_processes_at_once(kind: str) -> None:
    measured = concurrent_store.run(processes=4, operations=160, kinds=[kind])
    assert concurrent_store.missed(measured) == []
    assert measured["kinds"][kind]["done"] > 80
    assert f"| {kind} |" in concurrent_store.table(measured)


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("redis", marks=pytest.mark.slow)], indirect=True)
def test_a_sample_of_the_kills(kind: str) -> None:
    measured = kill_store.run(kills=5, kinds=[kind])
    assert kill_store.missed(measured) == []
    found = measured["kinds"][kind]
    assert (found["kills"], found["server_kills"]) == (5, 0 if kind == "sqlite" else 1)
    assert found["told"]["published"] > 0
    assert f"| {kind} | 5 |" in kill_store.table(measured)


def test_the_judge_of_the_kills_sees_what_is_wrong() -> None:
    with place("sqlite") as where:
        store = Store.open(where.url)
        version = publish(store.backend, "a", digest="a")

        def judged(*lines: list[object]) -> list[str]:
            ledger = Ledger()
            ledger.hear([[1, number, *line] for number, line in enumerate(lines)])
            ledger._check_versions(store)
            return ledger.wrong

        published = ["published", ["a", 1, version.digest]]
        assert judged(published) == []
        assert judged(["published", ["a", 1, "b" * 64]], published)[0].endswith("given out twice")
        for line, what in [
            (["deleting", ["a", 1]], None),
            (["published", ["a", 1, "b" * 64]], "another one now"),
            (["published", ["a", 2, "b" * 64]], "lost"),
            (["deleted", ["a", 1]], "is back"),
        ]:
            with pytest.raises(AssertionError, match=what) if what else nullcontext():
                judged(line)
        store.close()


@pytest.mark.slow
def test_a_sample_of_the_costs(kind: str) -> None:
    costs = store_costs.growth(kind, few=20, many=1_000, times=20)
    assert {what: found["ratio"] < 2 * store_costs.GROWTH for what, found in costs.items()} == {  # few, so noisy
        **dict.fromkeys(("resolve", "publish", "load"), True)
    }


def test_a_sample_of_the_prefixes_on_disk() -> None:
    disk = store_costs.on_disk(3)
    assert disk["model_bytes"] == 4 * 354_823_168
    assert disk["bytes"] / 3 * store_costs.TASKS < 0.8 * disk["model_bytes"]  # of which a little is the empty store


def test_a_proof_says_what_it_missed() -> None:
    good = {"ratio": 2.0, "few_ms": 1.0, "many_ms": 2.0}
    costs = {"disk": {"share_of_model": 0.75}, "kinds": {"sqlite": {"resolve": good}}}
    assert store_costs.missed(costs) == []
    bad = {"disk": {"share_of_model": 0.76}, "kinds": {"sqlite": {"resolve": {**good, "ratio": 2.1}}}}
    assert len(store_costs.missed(bad)) == 2
    wrong = {"kinds": {"sqlite": {"wrong": ["a version was lost"]}}}
    assert concurrent_store.missed(wrong) == kill_store.missed(wrong) == ["sqlite: a version was lost"]
