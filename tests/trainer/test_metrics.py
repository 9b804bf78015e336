from __future__ import annotations

from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry

from prefix_store.store import Store
from tests.trainer.test_worker import make_worker, submit
from trainer.metrics import Metrics


@pytest.fixture
def store(tmp_path) -> Iterator[Store]:
    opened = Store.open(f"sqlite:///{tmp_path}/store.db")
    yield opened
    opened.close()


def test_a_worker_s_work_is_counted(store):
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    seen: list[float] = []

    def stepped() -> None:
        metrics.stepped()
        seen.append(registry.get_sample_value("antefix_worker_jobs_running"))
        seen.append(registry.get_sample_value("antefix_worker_pack_bytes"))

    worker = make_worker(store, memory_bytes=1 << 30, on_step=stepped, on_pack=metrics.packed, on_end=metrics.ended)
    metrics.watch(worker, lambda: store.jobs.lapsed)
    ended = {"status": "succeeded"}
    assert registry.get_sample_value("antefix_worker_jobs_total", ended) == 0, "it is there before the first ends"
    for name in ("a", "b"):
        submit(store, name=name, steps=5, publish_anyway=True)
    worker.run_until_empty()
    value = registry.get_sample_value
    assert value("antefix_worker_jobs_total", ended) == 2
    assert value("antefix_worker_steps_total") == 10
    assert 5 <= value("antefix_worker_step_seconds_count") <= 10, "those that share a step are one"
    assert value("antefix_worker_step_seconds_sum") > 0
    jobs = store.jobs.jobs("acme", None, 2)
    assert value("antefix_worker_tokens_total") == sum(job.progress["trained_tokens"] for job in jobs)
    assert max(seen[::2]) >= 1
    assert min(seen[1::2]) > 0
    assert (value("antefix_worker_jobs_running"), value("antefix_worker_pack_bytes")) == (0, 0)
    assert value("antefix_worker_pack_limit_bytes") == 1 << 30
    assert value("antefix_worker_leases_expired_total") == 0
