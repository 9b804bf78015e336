"""The proof of faults: its own arithmetic, and a small sample of each fault on real processes.

A worker that is killed is not sampled here: its job goes on when its lease has lapsed, half a minute later.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.prove import faults
from tests.prove.faulty_stage import Stage, on_redis, on_small_disk
from tests.prove.slow_proxy import SlowProxy
from tests.prove.steady_load import LONG, PROMPTS, SHORT, Failure, Load
from tests.redis_server import program, running

WANTED = (("plays", PROMPTS[0], SHORT), (None, PROMPTS[0], SHORT), ("factbook", PROMPTS[0], LONG))
FAULT: dict[str, Any] = {
    "requests": 10,
    "failed": {},
    "wrong": [],
    "lost": [],
    "unclear": [],
    "whole_seconds": 1.5,
}


@pytest.fixture(scope="module")
def on_a_redis() -> Iterator[Stage]:
    if program("redis") is None:
        pytest.skip("no redis-server for this machine")
    with on_redis(faults.make_files(), clients=4, settle=1.0, wanted=WANTED) as stage:
        yield stage


def assert_right(name: str, found: dict[str, Any]) -> None:
    assert faults.missed({"faults": {name: found}, "left_out": []}) == [], found
    assert found["requests"] > 0


@pytest.mark.slow
def test_a_sample_of_a_store_that_dies(on_a_redis: Stage) -> None:
    found = faults.redis_killed(on_a_redis, away=4.0)
    assert_right("Redis killed", found)
    assert found["readyz"] == {"status": "degraded", "model": True, "store": False}


@pytest.mark.slow
def test_a_sample_of_a_slow_store(on_a_redis: Stage) -> None:
    assert_right("store late", faults.store_slow(on_a_redis, 0.2, 3.0))


@pytest.mark.slow
def test_a_sample_of_a_server_that_is_killed(on_a_redis: Stage) -> None:
    found = faults.server_killed(on_a_redis)
    assert_right("server killed", found)
    assert found["failed"], "the requests that it was answering"


@pytest.mark.slow
def test_a_sample_of_a_full_disk() -> None:
    try:
        with on_small_disk(faults.make_files(), clients=4, settle=1.0, wanted=WANTED) as stage:
            assert_right("disk full", faults.disk_full(stage, full=4.0))
    except PermissionError as error:
        pytest.skip(str(error))


def test_a_bar_that_is_missed_is_named() -> None:
    good = {"server killed": FAULT | {"failed": {"connection closed": 3}}, "trainer killed": FAULT}
    assert faults.missed({"faults": good, "left_out": []}) == []
    gaps = {key: {"before": 20.0, "meanwhile": 30.0} for key in ("gap_p99_ms", "worst_gap_ms")}
    assert faults.missed({"faults": {"trainer killed": FAULT | gaps}, "left_out": []}) == []
    gaps["worst_gap_ms"] = {"before": 20.0, "meanwhile": 5000.0}
    for change in ({"wrong": ["x"]}, {"lost": ["x"]}, {"unclear": ["x"]}, {"failed": {"x": 1}}, gaps):
        assert len(faults.missed({"faults": {"trainer killed": FAULT | change}, "left_out": []})) == 1
    assert len(faults.missed({"faults": good, "left_out": ["disk full"]})) == 1
    shown = faults.table({"clients": 16, "faults": good})
    assert "| server killed | 10 | 3 connection closed | 0 | 0 | 1.5 s |" in shown
    assert "| trainer killed | 10 | 0 | 0 | 0 | 1.5 s |" in shown


def test_a_wrong_answer_and_a_failure_are_told_apart() -> None:
    load = Load("http://127.0.0.1:1", dict.fromkeys([("plays", "x", SHORT), ("plays", "x", LONG)], "right"), [])
    load._whole = lambda client, each: "wrong"  # type: ignore[method-assign]
    load._stream = lambda client, each: Failure("connection refused", is_clear=True)  # type: ignore[method-assign]
    with load.running(clients=2):
        time.sleep(0.3)
    assert load.wrong
    assert set(load.failures()) == {"connection refused"}
    assert (load.unclear(), load.first_right(0.0)) == ([], None)


def test_gaps_are_those_of_the_time_that_is_asked_about() -> None:
    load = Load("", {}, [], gaps=[(1.0, 0.1), (2.0, 0.5), (3.0, 0.2)])
    assert (load.worst_gap(0, 9), load.worst_gap(2.5, 9), load.worst_gap(5, 9)) == (0.5, 0.2, 0.0)
    assert load.gap_percentile(50, 0, 9) == 0.2


def test_the_proxy_makes_answers_late_and_tells_of_a_dead_server(tmp_path: Path) -> None:
    if program("redis") is None:
        pytest.skip("no redis-server for this machine")
    with running("redis", tmp_path) as server, SlowProxy(tmp_path / "redis.sock").running() as proxy:
        client = redis.Redis.from_url(proxy.url)
        assert client.ping()
        proxy.delay = 0.3
        begun = time.monotonic()
        assert client.set("a", "b")
        assert time.monotonic() - begun >= 0.3
        proxy.delay = 0.0
        server.stop()
        with pytest.raises(redis.ConnectionError):
            client.ping()
        server.start()
        assert client.get("a") == b"b"
        client.close()


def test_filling_a_full_disk_ends() -> None:
    """On something that is full from the start, every write fails and none is repeated for ever."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    faults.fill(full)
