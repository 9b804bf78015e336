"""What Prometheus scrapes of a worker. docs/metrics.md lists every family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from prefix_store.jobs import TRANSITIONS, JobStatus
from trainer.worker import LOST, Worker

STEP_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Counts what a worker tells of, and looks at what it has at every scrape."""

    def __init__(self, registry: CollectorRegistry) -> None:
        disable_created_metrics()  # a line for each line, with the moment at which it began
        self._registry = registry
        self._jobs = Counter("antefix_worker_jobs", "Jobs by how they ended here", ["status"], registry=registry)
        self._steps = Counter("antefix_worker_steps", "Training steps taken, one a job", registry=registry)
        self._tokens = Counter("antefix_worker_tokens", "Tokens trained on", registry=registry)
        self._seconds = Histogram(
            "antefix_worker_step_seconds",
            "A training step of all jobs that share it",
            buckets=STEP_SECONDS,
            registry=registry,
        )
        ProcessCollector(registry=registry)
        for status in (*TRANSITIONS[JobStatus.RUNNING], LOST):  # so that the first of a kind is seen as a step from 0
            self._jobs.labels(status)

    def watch(self, worker: Worker, lapsed: Callable[[], int]) -> None:
        """Shows what a worker has; `lapsed`: how many leases of other workers it has found to have run out."""
        self._registry.register(_Load(worker, lapsed))

    def stepped(self) -> None:
        """A job has taken a step."""
        self._steps.inc()

    def packed(self, tokens: int, seconds: float) -> None:
        """All that shared a step have taken it."""
        self._tokens.inc(tokens)
        self._seconds.observe(seconds)

    def ended(self, status: str) -> None:
        """A job has ended for this worker."""
        self._jobs.labels(status).inc()


class _Load(Collector):
    def __init__(self, worker: Worker, lapsed: Callable[[], int]) -> None:
        self._worker, self._lapsed = worker, lapsed

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        jobs, used, room = self._worker.load
        gauges = {
            "jobs_running": (jobs, "Jobs that train here now"),
            "pack_bytes": (used, "Memory that a step of them is reckoned to take"),
            "pack_limit_bytes": (room, "Memory that a step may take"),
        }
        for name, (value, text) in gauges.items():
            yield GaugeMetricFamily(f"antefix_worker_{name}", text, value=value)
        text = "Leases that ran out, of jobs that were then taken over or ended here"
        yield CounterMetricFamily("antefix_worker_leases_expired", text, value=self._lapsed())
