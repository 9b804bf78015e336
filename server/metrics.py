"""What Prometheus scrapes. Numbers that others own are read from them at scrape time; the rest is counted here.

No label ever holds a prefix, a key or anything else that a caller can make up, and only so many hold a tenant.
docs/metrics.md lists every family.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from server import exposition
from server.busiest import Busiest
from server.distribution import SECONDS, SHORT_SECONDS, powers_of_two
from server.exposition import Collected, StoreNumbers

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PROMPT, GENERATION = "prompt", "generation"
MOST_TOKENS = 1 << 17


class Metrics:
    """The registry of one server.

    `engine` and `host` give the numbers of the engine and of the prefixes in host memory, as attributes; `store` those
    of the store, or None while it is away: then those lines are left out, and all others still stand.
    """

    def __init__(
        self,
        engine: Callable[[], object],
        host: Callable[[], object],
        store: Callable[[], StoreNumbers | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        disable_created_metrics()  # a line for each line, with the moment at which it began
        self.registry = CollectorRegistry()
        self.tenants = Busiest((PROMPT, GENERATION), clock=clock)
        self.registry.register(Collected(lambda: exposition.of_engine(engine(), host(), self.tenants)))
        self.registry.register(Collected(lambda: exposition.of_tenants(self.tenants)))
        self.registry.register(Collected(lambda: exposition.of_store(store())))
        ProcessCollector(registry=self.registry)
        self.first_token = self._histogram("time_to_first_token_seconds", "From arrival to the first token")
        self.latency = self._histogram("e2e_request_latency_seconds", "From arrival to the last token")
        self.pace = self._histogram(
            "request_time_per_output_token_seconds", "A call's mean time for each token behind its first", SHORT_SECONDS
        )
        counts = powers_of_two(MOST_TOKENS)
        self.prompt_length = self._histogram("request_prompt_tokens", "Tokens of a call's prompts", counts)
        self.answer_length = self._histogram("request_generation_tokens", "Tokens generated for a call", counts)
        self.prefix_load = self._histogram(
            "prefix_resolve_seconds", "From a request's reference to its prefix in host memory"
        )
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

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
        return Histogram(f"antefix_{name}", text, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"antefix_{name}", text, labels, registry=self.registry)
