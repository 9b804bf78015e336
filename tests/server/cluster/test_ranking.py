from __future__ import annotations

import random
from collections import Counter, defaultdict, deque

import pytest

from server.cluster.ranking import Ranking, key_of


@pytest.mark.parametrize(
    ("path", "body", "key"),
    [
        ("/generate", b'{"prompt": "x", "prefix_id" : "plays@3"}', "plays"),
        ("/generate", b'{"prefix_id":"other/plays@latest","prompt":"x"}', "plays"),
        ("/generate", rb'{"prompt": "\"prefix_id\": \"plays\""}', None),
        ("/generate", b'{"prefix_id": null, "prompt": "x"}', None),
        ("/generate", b'{"prefix_id": "acme/@3"}', None),
        ("/v1/completions", b'{"model": "plays"}', "plays"),
        ("/v1/chat/completions", b'{"model": "acme/plays", "messages": []}', "plays"),
        ("/v1/prefixes/acme/plays@2/preload", b"", "plays"),
        ("/v1/prefixes/plays", b'{"model": "plays"}', None),
    ],
)
def test_the_key_is_the_prefix_without_its_owner_and_version(path: str, body: bytes, key: str | None) -> None:
    assert key_of(path, body) == key


def choose(key: str | None, loads: dict[str, int], avoided: tuple[str, ...] = ()) -> str:
    return Ranking().choose(key, loads, avoided)


def test_a_replica_that_goes_moves_its_own_prefixes_and_no_others() -> None:
    keys = [str(number) for number in range(300)]
    before = {key: choose(key, {"a": 0, "b": 0, "c": 0}) for key in keys}
    after = {key: choose(key, {"a": 0, "c": 0}) for key in keys}
    assert {key for key in keys if before[key] != after[key]} == {key for key in keys if before[key] == "b"}
    assert all(70 < count < 130 for count in Counter(before.values()).values())


def test_a_few_requests_for_one_prefix_all_go_home() -> None:
    ranking, home = Ranking(), choose("x", {"a": 0, "b": 0})
    assert {ranking.choose("x", {"a": 0, "b": 0, home: 2}) for _ in range(300)} == {home}


def test_a_home_that_has_more_than_its_share_for_a_while_is_passed_over() -> None:
    ranking, home = Ranking(), choose("x", {"a": 0, "b": 0})
    went = [ranking.choose("x", {"a": 6, "b": 6, home: 11}) for _ in range(300)]
    assert went[0] == home != went[-1]
    assert ranking.choose("x", {"a": 6, "b": 6}) != home  # not forgotten at once
    assert {ranking.choose("x", {"a": 6, "b": 6}) for _ in range(300)} >= {home}


def test_a_burst_does_not_wait_for_that() -> None:
    home = choose("x", {"a": 0, "b": 0})
    assert choose("x", {"a": 0, "b": 0, home: 40}) != home


def test_one_to_avoid_is_avoided_however_busy_the_other_is() -> None:
    home = choose("x", {"a": 0, "b": 0})
    (other,) = {"a", "b"} - {home}
    assert choose("x", {home: 0, other: 90}, (home,)) == other
    assert choose(None, {home: 0, other: 90}, (home,)) == other


def test_without_a_prefix_it_is_the_one_with_the_fewest() -> None:
    assert choose(None, {"a": 3, "b": 1, "c": 2}) == "b"


def closed_load(weights: list[float], seed: int, clients: int = 16, requests: int = 3000) -> tuple[float, float]:
    """Affinity, and the busier replica's share, where a fuller batch is slower for each and faster for all."""
    draws, ranking = random.Random(seed), Ranking()
    running: dict[str, deque[int]] = {f"{seed}-a": deque(), f"{seed}-b": deque()}
    went: defaultdict[int, Counter[str]] = defaultdict(Counter)
    for number in range(requests):
        if number >= clients:
            queues = list(running.values())
            draws.choices(queues, [len(queue) / (1 + 0.15 * len(queue)) for queue in queues])[0].popleft()
        (prefix,) = draws.choices(range(len(weights)), weights)
        replica = ranking.choose(f"{seed}-{prefix}", {name: len(queue) for name, queue in running.items()})
        running[replica].append(prefix)
        went[prefix][replica] += 1
    total = sum(went.values(), Counter())
    return sum(max(counts.values()) for counts in went.values()) / requests, max(total.values()) / requests


def test_prefixes_stay_at_home_and_no_replica_has_much_more_than_its_share() -> None:
    found = [closed_load([1.0] * 32, seed) for seed in range(6)]
    assert sum(affinity for affinity, _ in found) / 6 > 0.9
    assert min(affinity for affinity, _ in found) > 0.88
    assert max(busiest for _, busiest in found) <= 0.6


@pytest.mark.parametrize("weights", [[60.0, *[1.0] * 31], [1 / rank for rank in range(1, 33)], [1.0]])
def test_one_prefix_that_all_ask_for_is_shared_between_replicas(weights: list[float]) -> None:
    assert max(closed_load(weights, seed)[1] for seed in range(6)) <= 0.6
