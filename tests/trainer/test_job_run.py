from __future__ import annotations

import pytest

from prefix_store.store import Store
from tests.models import tiny_frozen
from trainer import training_model
from trainer.job_run import TURN_SECONDS, JobRun, begin
from trainer.lease import Lease
from trainer.memory import TooLarge
from trainer.methods import METHODS
from trainer.slices import done

FROZEN = training_model.attach(tiny_frozen("llama"))
EXAMPLES = [{"prompt": f"{number} is", "completion": " a number"} for number in range(3)]


def begun(store: Store, clock, budget: int = 1 << 30, **options) -> JobRun:
    store.jobs.submit("acme", "numbers", EXAMPLES, {"virtual_tokens": 3, "max_length": 24, **options})
    job = store.jobs.claim("w", 60.0)
    assert job is not None
    return done(begin(store, FROZEN, METHODS, Lease(store, job, 60.0), lambda line: None, clock, budget))


@pytest.fixture
def store(tmp_path):
    opened = Store.open(f"sqlite:///{tmp_path}/store.db")
    yield opened
    opened.close()


def test_a_turn_is_over_when_its_time_is(store):
    time_now = [5.0]
    run = begun(store, lambda: time_now[0])
    time_now[0] += TURN_SECONDS - 1
    assert not run.had_turn
    time_now[0] += 1
    assert run.had_turn


def test_a_run_costs_no_more_rows_than_it_has(store):
    assert begun(store, lambda: 0.0, batch_size=200).cost == begun(store, lambda: 0.0, batch_size=3).cost


def test_a_run_costs_what_its_method_tunes(store):
    small, large = (begun(store, lambda: 0.0, method="prefix_mlp", bottleneck=size) for size in (8, 4096))
    assert large.cost > small.cost + 4 * sum(parameter.numel() for parameter in large.tuning.method.parameters())
    with pytest.raises(TooLarge):
        begun(store, lambda: 0.0, small.cost, method="prefix_mlp", bottleneck=4096)
