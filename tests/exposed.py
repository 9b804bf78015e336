"""Every family of metrics that the server and a worker expose, each label with a value: files are held to it."""

from __future__ import annotations

from types import SimpleNamespace

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from prefix_store.jobs import JobStatus
from server.metrics import PROMPT
from tests.server import fakes
from trainer.metrics import Metrics as WorkerMetrics


def of_server() -> list[Metric]:
    """A server's that has met all that it counts."""
    metrics = fakes.metrics(jobs=lambda: dict.fromkeys(JobStatus, 1))
    metrics.tenants.count("acme", PROMPT, 1)
    for counter in (metrics.finished, metrics.refused, metrics.upload_rejected, metrics.from_memory):
        counter.labels("x")
    metrics.responses.labels("/", "200")
    return list(metrics.registry.collect())


def of_worker() -> list[Metric]:
    """A worker's."""
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry)
    metrics.watch(SimpleNamespace(load=(0, 0, 1)), lambda: 0)
    return list(registry.collect())


def name(family: Metric) -> str:
    """As it stands in a scrape: the library keeps a counter's suffix to itself."""
    return f"{family.name}_total" if family.type == "counter" else family.name


def labels(family: Metric) -> set[str]:
    """Its own, without a histogram's bounds."""
    return {label for sample in family.samples for label in sample.labels} - {"le"}


def samples(family: Metric) -> set[str]:
    """The names that a query may ask for."""
    found = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",)}.get(family.type, ("",))
    return {family.name + suffix for suffix in found}
