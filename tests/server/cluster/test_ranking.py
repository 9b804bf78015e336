from __future__ import annotations

import random
from collections import Counter, defaultdict, deque

import pytest

from server.cluster.ranking import Ranking, key_of

MODEL = "base"


@pytest.mark.parametrize(
    ("path", "body", "key"),
    [
        ("/generate", b'{"prompt": "x", "prefix_id" : "plays@3"}', "acme/plays"),
        ("/generate", b'{"prefix_id":"other/plays@latest","prompt":"x"}', "other/plays"),
        ("/generate", rb'{"prompt": "\"prefix_id\": \"plays\""}', None),
        ("/generate", b'{"prefix_id": null, "prompt": "x"}', None),
        ("/generate", b'{"prefix_id": "No Such Name"}', None),
        ("/v1/completions", b'{"model": "plays"}', "acme/plays"),
        ("/v1/chat/completions", b'{"model": "base", "messages": []}', None),
        ("/v1/prefixes/plays@2/preload", b"", "acme/plays"),
        ("/v1/prefixes/plays", b'{"model": "plays"}', None),
    ],
)
def test_the_key_is_the_tenant_and_the_prefix_without_its_version(path: str, body: bytes, key: str | None) -> None:
    assert key_of(path, body, "acme", MODEL) == key


def homes(replicas: list[str], keys: list[str]) -> dict[str, str]:
    idle = dict.fromkeys(replicas, 0)
    return {key: Ranking(64).order(key, idle)[0] for key in keys}


def test_a_replica_that_goes_moves_its_own_prefixes_and_no_others() -> None:
    keys = [f"acme/{number}" for number in range(300)]
    before, after = homes(["a", "b", "c"], keys), homes(["a", "c"], keys)
    assert {key for key in keys if before[key] != after[key]} == {key for key in keys if before[key] == "b"}
    assert all(70 < count < 130 for count in Counter(before.values()).values())


def test_a_full_batch_is_passed_over_and_one_to_avoid_even_more() -> None:
    first, second, third = Ranking(8).order("acme/x", {"a": 0, "b": 0, "c": 0})
    assert Ranking(8).order("acme/x", {first: 8, second: 7, third: 0}) == [second, third, first]
    assert Ranking(8).order("acme/x", {first: 0, second: 8, third: 8}, avoided=[first])[-1] == first


def test_without_a_prefix_the_least_loaded_is_first_and_equals_take_turns() -> None:
    ranking = Ranking(8)
    assert ranking.order(None, {"a": 3, "b": 1, "c": 2}) == ["b", "c", "a"]
    assert {ranking.order(None, {"a": 0, "b": 0})[0] for _ in range(50)} == {"a", "b"}


def test_a_few_requests_for_one_prefix_all_go_home() -> None:
    ranking, home = Ranking(64), Ranking(64).order("acme/x", {"a": 0, "b": 0})[0]
    assert {ranking.order("acme/x", {"a": 0, "b": 0, home: 1})[0] for _ in range(20)} == {home}


def closed_load(weights: list[float], seed: int, clients: int = 16, requests: int = 3000) -> tuple[float, float]:
    """Affinity, and the busier replica's share, where a fuller batch is slower for each and faster for all."""
    draws, ranking = random.Random(seed), Ranking(64)
    running: dict[str, deque[int]] = {f"{seed}-a": deque(), f"{seed}-b": deque()}
    went: defaultdict[int, Counter[str]] = defaultdict(Counter)
    for number in range(requests):
        if number >= clients:
            queues = list(running.values())
            draws.choices(queues, [len(queue) / (1 + 0.15 * len(queue)) for queue in queues])[0].popleft()
        (prefix,) = draws.choices(range(len(weights)), weights)
        loads = {name: len(queue) for name, queue in running.items()}
        replica = ranking.order(f"acme/{seed}-{prefix}", loads)[0]
        running[replica].append(prefix)
        went[prefix][replica] += 1
    total = sum(went.values(), Counter())
    return sum(max(counts.values()) for counts in went.values()) / requests, max(total.values()) / requests


def test_prefixes_stay_at_home_and_no_replica_has_much_more_than_its_share() -> None:
    found = [closed_load([1.0] * 32, seed) for seed in range(6)]
    assert sum(affinity for affinity, _ in found) / 6 > 0.9  # 0.92
    assert min(affinity for affinity, _ in found) > 0.85
    assert max(busiest for _, busiest in found) <= 0.6  # 0.52


@pytest.mark.parametrize("weights", [[60.0, *[1.0] * 31], [1 / rank for rank in range(1, 33)], [1.0]])
def test_one_prefix_that_all_ask_for_is_shared_between_replicas(weights: list[float]) -> None:
    assert max(closed_load(weights, seed)[1] for seed in range(6)) <= 0.6  # 0.55
