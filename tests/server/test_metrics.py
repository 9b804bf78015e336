from prometheus_client.parser import text_string_to_metric_families

from prefix_store.errors import StoreUnavailable
from prefix_store.jobs import JobStatus
from server.metrics import Metrics
from tests.server.fakes import stats


def samples(metrics: Metrics) -> dict[str, float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {
        "|".join([sample.name, *sample.labels.values()]): sample.value
        for family in families
        for sample in family.samples
    }


def test_engine_numbers_are_read_at_every_scrape() -> None:
    running = iter([1, 2])
    metrics = Metrics(lambda: stats(running=next(running), waiting=3, prefix_hits=4, generated_tokens=5), dict)
    assert samples(metrics)["antefix_num_requests_running"] == 1
    second = samples(metrics)
    assert second["antefix_num_requests_running"] == 2
    assert second["antefix_num_requests_waiting"] == 3
    assert second["antefix_prefix_cache_hits_total"] == 4
    assert second["antefix_generation_tokens_total"] == 5


def test_jobs_by_state() -> None:
    shown = samples(Metrics(stats, lambda: {JobStatus.QUEUED: 2, JobStatus.FAILED: 1}))
    assert shown["antefix_jobs|queued"] == 2
    assert shown["antefix_jobs|failed"] == 1


def test_the_engine_is_still_shown_when_the_store_is_away() -> None:
    def away() -> dict[JobStatus, int]:
        raise StoreUnavailable("gone")

    shown = samples(Metrics(lambda: stats(running=1), away))
    assert shown["antefix_num_requests_running"] == 1
    assert not any(name.startswith("antefix_jobs") for name in shown)


def test_two_servers_in_one_process_do_not_share_counters() -> None:
    first, second = Metrics(stats, dict), Metrics(stats, dict)
    first.finished.labels("stop").inc()
    assert samples(first)["antefix_request_success_total|stop"] == 1
    assert "antefix_request_success_total|stop" not in samples(second)
