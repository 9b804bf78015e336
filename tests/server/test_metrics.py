from __future__ import annotations

import random
import re

from prometheus_client.parser import text_string_to_metric_families

from prefix_store.errors import StoreUnavailable
from prefix_store.jobs import JobStatus
from server.busiest import MOST, OTHER, PERIOD_SECONDS
from server.distribution import Distribution
from server.metrics import GENERATION, PROMPT, Metrics
from tests.server.fakes import FREE_BYTES, host_stats, metrics, stats


def samples(metrics: Metrics) -> dict[str, float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {
        "|".join([sample.name, *sample.labels.values()]): sample.value
        for family in families
        for sample in family.samples
    }


def test_engine_numbers_are_read_at_every_scrape() -> None:
    running = iter([1, 2])
    shown = metrics(lambda: stats(running=next(running), waiting=3, prefix_hits=4, generated_tokens=5))
    assert samples(shown)["antefix_num_requests_running"] == 1
    second = samples(shown)
    assert second["antefix_num_requests_running"] == 2
    assert second["antefix_num_requests_waiting"] == 3
    assert second["antefix_residency_hits_total|device"] == 4
    assert second["antefix_generation_tokens_total"] == 5


def test_each_tier_has_its_own_numbers() -> None:
    counted = Distribution((0.1, 1))
    counted.add(0.1)
    counted.add(5)
    shown = samples(
        metrics(lambda: stats(prefix_evictions=2, prefix_bytes=64), host=lambda: host_stats(loads=counted.read()))
    )
    assert shown["antefix_residency_evictions_total|device"] == 2
    assert shown["antefix_residency_evictions_total|host"] == 0
    assert (shown["antefix_residency_bytes|device"], shown["antefix_residency_bytes|host"]) == (64, 0)
    assert shown["antefix_residency_load_seconds_bucket|0.1|host"] == 1
    assert shown["antefix_residency_load_seconds_bucket|1.0|host"] == 1
    assert shown["antefix_residency_load_seconds_count|host"] == 2
    assert shown["antefix_residency_load_seconds_sum|host"] == 5.1
    assert shown["antefix_residency_load_seconds_count|device"] == 0


def test_jobs_by_state() -> None:
    shown = samples(metrics(jobs=lambda: {JobStatus.QUEUED: 2, JobStatus.FAILED: 1}, overdue=lambda: 3))
    assert shown["antefix_jobs|queued"] == 2
    assert shown["antefix_jobs|failed"] == 1
    assert (shown["antefix_jobs_overdue"], shown["antefix_store_up"]) == (3, 1)
    assert shown["antefix_blobs_free_bytes"] == FREE_BYTES


def test_the_engine_is_still_shown_when_the_store_is_away() -> None:
    def away() -> dict[JobStatus, int]:
        raise StoreUnavailable("gone")

    shown = samples(metrics(lambda: stats(running=1), away))
    assert shown["antefix_num_requests_running"] == 1
    assert shown["antefix_store_up"] == 0
    assert not any(name.startswith(("antefix_jobs", "antefix_blobs")) for name in shown)


def test_two_servers_in_one_process_do_not_share_counters() -> None:
    first, second = metrics(), metrics()
    first.finished.labels("stop").inc()
    assert samples(first)["antefix_request_success_total|stop"] == 1
    assert "antefix_request_success_total|stop" not in samples(second)


def test_ten_thousand_tenants_that_all_call_and_wait_are_no_more_lines_than_fifty() -> None:
    now = [0.0]
    tenants = [f"tenant-{index}" for index in range(10_000)]
    crowd = dict.fromkeys(tenants, 1)
    shown = metrics(lambda: stats(waiting_of=crowd, running_of=crowd), clock=lambda: now[0])
    draws, ever, lines = random.Random(0), set(), set()
    for _ in range(10):
        for tenant in draws.sample(tenants, len(tenants)):
            shown.tenants.count(tenant, draws.choice([PROMPT, GENERATION]), 7)
        now[0] += PERIOD_SECONDS
        found = named(shown)
        assert OTHER in found
        ever |= found
        lines.add(len(shown.render().splitlines()))
    assert len(ever) == MOST + 1, "who all do the same take no names from one another"
    assert len(lines) == 1, "and a scrape does not grow"
    of_queue = [number for name, number in samples(shown).items() if "tenant_requests_waiting|" in name]
    assert sum(of_queue) == 10_000
    assert sum(number for name, number in samples(shown).items() if "tenant_tokens" in name) == 10 * 10_000 * 7


def test_names_change_slowly_however_many_tenants_take_turns_at_being_the_busiest() -> None:
    now = [0.0]
    shown = metrics(clock=lambda: now[0])
    ever: set[str] = set()
    for wave in range(10):
        for index in range(1000):
            shown.tenants.count(f"tenant-{wave}-{index}", PROMPT, 10**wave)
        found = named(shown)
        assert len(found) == MOST + 1
        assert len(found - ever) <= MOST + (wave == 0)
        ever |= found
        now[0] += PERIOD_SECONDS
    assert len(ever) <= 10 * MOST + 1


def named(metrics: Metrics) -> set[str]:
    return set(re.findall(r'tenant="([^"]*)"', metrics.render().decode()))
