"""Numbers that others own as families of metrics, made at every scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from server.busiest import Busiest
from server.distribution import Reading

DEVICE, HOST = "device", "host"
GAUGES = {
    "num_requests_running": ("running", "Sequences in the running batch"),
    "num_requests_waiting": ("waiting", "Sequences that wait for room"),
    "kv_cache_usage_perc": ("kv_usage", "Share of the KV pool that cannot be freed now, from 0 to 1"),
    "kv_slots": ("kv_slots", "Tokens that the KV pool holds"),
    "kv_slots_used": ("kv_slots_used", "Tokens in the KV pool now, those of idle prefixes included"),
    "prefixes_preloaded": ("prefixes_preloaded", "Prefixes that stay in the KV pool until they are released"),
    "engine_up": ("alive", "1 while the engine takes requests, 0 once it has failed or is stopping"),
}
COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Prompt tokens computed"),
    "generation_tokens": ("generated_tokens", "Tokens generated"),
    "engine_steps": ("steps", "Steps of the engine"),
    "out_of_memory": ("shortages", "Times that memory ran out: in a step, which then went on in pieces, or in a load"),
    "num_preemptions": ("preemptions", "Sequences sent back to the queue, for want of slots or for another tenant"),
}
HISTOGRAMS = {
    "request_queue_time_seconds": ("queue", "From arrival in the engine until the first step, or until it ended"),
    "request_prefill_time_seconds": ("prefill", "From the first step until the first token"),
    "request_decode_time_seconds": ("decode", "From the first token until the end"),
    "inter_token_latency_seconds": ("gaps", "From one token of a sequence until the next"),
    "step_seconds": ("step_seconds", "A step, from its launch until its tokens, less what the one before took of that"),
    "step_rows": ("step_rows", "Rows in a step"),
    "step_tokens": ("step_tokens", "Tokens that a step computed, of prompts and of answers"),
    "step_distinct_prefixes": ("step_prefixes", "Different prefixes in a step; rows without one count for none"),
}
OF_TENANTS = {
    "tenant_requests_running": ("running_of", "Sequences in the running batch, by tenant"),
    "tenant_requests_waiting": ("waiting_of", "Sequences that wait for room, by tenant"),
}
# Of one tier of memory: the attribute of its numbers, which both the engine and the loader have.
TIER_GAUGES = {
    "residency_prefixes": ("prefixes_resident", "Prefixes that are held"),
    "residency_bytes": ("prefix_bytes", "Memory of the prefixes that are held"),
}
TIER_COUNTERS = {
    "residency_hits": ("prefix_hits", "Uses of a prefix that was there"),
    "residency_misses": ("prefix_misses", "Uses of a prefix that had to be brought there first"),
    "residency_evictions": ("prefix_evictions", "Prefixes that were evicted, mostly for others"),
}


@dataclass(frozen=True)
class StoreNumbers:
    """What the store says at a scrape. `free_bytes`: on the disk under its blobs, None where they lie in no folder."""

    jobs: Mapping[Any, int]
    overdue: int
    free_bytes: int | None


class Collected(Collector):
    """A function that is asked at every scrape."""

    def __init__(self, families: Callable[[], Iterable[Metric]]) -> None:
        self._families = families

    def describe(self) -> Iterable[Metric]:
        """Nothing, else registering would already ask."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """What the function returns."""
        return self._families()


def of_engine(engine: object, host: object, tenants: Busiest) -> Iterator[Metric]:
    """What the engine and the loader count; each has its numbers as attributes."""
    for name, (field, text) in GAUGES.items():
        yield GaugeMetricFamily(f"antefix_{name}", text, value=getattr(engine, field))
    for name, (field, text) in COUNTERS.items():
        yield CounterMetricFamily(f"antefix_{name}", text, value=getattr(engine, field))
    for name, (field, text) in HISTOGRAMS.items():
        yield _histogram(name, text, [], {(): getattr(engine, field)})
    for name, (field, text) in OF_TENANTS.items():
        numbers = tenants.fold(getattr(engine, field))
        yield _labelled(GaugeMetricFamily(f"antefix_{name}", text, labels=["tenant"]), numbers)
    yield from _of_tiers({DEVICE: engine, HOST: host})


def of_tenants(tenants: Busiest) -> Iterator[Metric]:
    """Tokens by tenant."""
    text = "Tokens by tenant, prompts as they begin and answers as they end"
    family = CounterMetricFamily("antefix_tenant_tokens", text, labels=["tenant", "kind"])
    for name, tokens in tenants.totals().items():
        for kind, count in tokens.items():
            family.add_metric([name, kind], count)
    yield family


def of_store(found: StoreNumbers | None) -> Iterator[Metric]:
    """What the store has said; where it has not, that it is away, and no more."""
    jobs = GaugeMetricFamily("antefix_jobs", "Training jobs by state", labels=["state"])
    late = GaugeMetricFamily("antefix_jobs_overdue", "Running jobs whose worker has stopped answering")
    free = GaugeMetricFamily("antefix_blobs_free_bytes", "Room on the disk under the blob folder")
    text = "1 if the store, its blobs included, answered this scrape"
    yield GaugeMetricFamily("antefix_store_up", text, value=int(found is not None))
    if found is not None:
        late.add_metric([], found.overdue)
        if found.free_bytes is not None:
            free.add_metric([], found.free_bytes)
    yield _labelled(jobs, {str(state): count for state, count in found.jobs.items()} if found is not None else {})
    yield from (late, free)


def _of_tiers(tiers: Mapping[str, Any]) -> Iterator[Metric]:
    for name, (field, text) in TIER_GAUGES.items():
        numbers = {tier: getattr(owner, field) for tier, owner in tiers.items()}
        yield _labelled(GaugeMetricFamily(f"antefix_{name}", text, labels=["tier"]), numbers)
    for name, (field, text) in TIER_COUNTERS.items():
        numbers = {tier: getattr(owner, field) for tier, owner in tiers.items()}
        yield _labelled(CounterMetricFamily(f"antefix_{name}", text, labels=["tier"]), numbers)
    readings: dict[tuple[str, ...], Reading] = {(tier,): owner.loads for tier, owner in tiers.items()}
    yield _histogram("residency_load_seconds", "Bringing a prefix there from the tier below", ["tier"], readings)


def _labelled(family: Any, numbers: Mapping[str, float]) -> Metric:
    """The family with a sample for each value of its one label."""
    for label, number in numbers.items():
        family.add_metric([label], number)
    found: Metric = family
    return found


def _histogram(name: str, text: str, labels: list[str], readings: Mapping[tuple[str, ...], Reading]) -> Metric:
    family = HistogramMetricFamily(f"antefix_{name}", text, labels=labels)
    for values, reading in readings.items():
        bounds = [*(floatToGoString(bound) for bound in reading.bounds), "+Inf"]
        family.add_metric(values, list(zip(bounds, reading.counts, strict=True)), reading.total)
    return family
