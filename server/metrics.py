"""What Prometheus scrapes. Numbers that others own are read from them at scrape time; the rest is counted here.

No label ever holds a prefix, a key or anything else a caller can make up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from prefix_store.errors import AntefixError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

GAUGES = {
    "num_requests_running": ("running", "Sequences in the running batch"),
    "num_requests_waiting": ("waiting", "Sequences that wait for room"),
    "kv_slots": ("kv_slots", "Tokens that the KV pool holds"),
    "kv_slots_used": ("kv_slots_used", "Tokens in the KV pool now"),
    "prefixes_resident": ("prefixes_resident", "Prefixes in the KV pool"),
    "prefixes_preloaded": ("prefixes_preloaded", "Prefixes that stay in the KV pool until they are released"),
    "distinct_prefixes": ("distinct_prefixes", "Different prefixes in the last step's batch"),
}
COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Prompt tokens computed"),
    "generation_tokens": ("generated_tokens", "Tokens generated"),
    "engine_steps": ("steps", "Steps of the engine"),
    "prefix_cache_hits": ("prefix_hits", "Requests whose prefix was in the KV pool"),
    "prefix_cache_misses": ("prefix_misses", "Requests whose prefix had to be brought into the KV pool"),
    "prefix_cache_evictions": ("prefix_evictions", "Prefixes that gave their slots back"),
    "num_preemptions": ("preemptions", "Sequences sent back to the queue, for want of slots or for another tenant"),
}


class Metrics:
    """The registry of one server.

    `stats` gives the engine's numbers as attributes; `job_counts` the jobs by state; while the store is away those
    lines are left out, and the engine's still stand.
    """

    def __init__(self, stats: Callable[[], object], job_counts: Callable[[], Mapping[Any, int]]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Collected(lambda: _engine(stats())))
        self.registry.register(_Collected(lambda: _jobs(job_counts)))
        self.first_token = self._histogram("time_to_first_token_seconds", "From arrival to the first token")
        self.latency = self._histogram("e2e_request_latency_seconds", "From arrival to the last token")
        self.prefix_load = self._histogram("prefix_load_seconds", "Resolving and reading a request's prefix")
        self.finished = self._counter("request_success", "Choices by finish reason", "finished_reason")
        self.refused = self._counter(
            "requests_refused", "Requests that failed for a known reason, by error code", "code"
        )
        self.upload_rejected = self._counter("upload_rejected", "Uploads refused, by error code", "code")
        self.from_memory = self._counter(
            "answers_from_memory", "Answers known from before, the store being away", "what"
        )
        self.responses = self._counter("http_responses", "Replies by route and status", "route", "status")

    def render(self) -> bytes:
        """The exposition text. Blocking: asks the store."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"antefix_{name}", text, buckets=SECONDS, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"antefix_{name}", text, labels, registry=self.registry)


class _Collected(Collector):
    """A function that is asked at every scrape."""

    def __init__(self, families: Callable[[], Iterable[Metric]]) -> None:
        self._families = families

    def describe(self) -> Iterable[Metric]:
        return ()  # else registering would already ask

    def collect(self) -> Iterable[Metric]:
        return self._families()


def _engine(stats: object) -> Iterator[Metric]:
    for name, (field, text) in GAUGES.items():
        yield GaugeMetricFamily(f"antefix_{name}", text, value=getattr(stats, field))
    for name, (field, text) in COUNTERS.items():
        yield CounterMetricFamily(f"antefix_{name}", text, value=getattr(stats, field))


def _jobs(job_counts: Callable[[], Mapping[Any, int]]) -> Iterator[Metric]:
    family = GaugeMetricFamily("antefix_jobs", "Training jobs by state", labels=["state"])
    try:
        counts = job_counts()
    except AntefixError:
        return
    for state, count in counts.items():
        family.add_metric([str(state)], count)
    yield family
