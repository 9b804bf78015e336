import pytest

from prefix_store.jobs import TrainingSpec
from trainer.schedule import SCHEDULES, share


def shares(kind: str, steps: int, warmup: float) -> list[float]:
    return [share(kind, step, steps, warmup) for step in range(1, steps + 1)]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_it_rises_in_a_line_and_falls_to_nearly_nothing(kind):
    rates = shares(kind, 100, 0.05)
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.02


def test_a_line_and_half_a_wave():
    assert shares("linear", 5, 0.0) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    # (1 + cos(pi * done)) / 2, with 0, 1/4, 1/2 and 3/4 of the way done
    assert shares("cosine", 4, 0.0) == pytest.approx([1, 0.853553, 0.5, 0.146447], abs=1e-6)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("warmup", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_every_run_reaches_its_peak_once_and_never_stands_still(kind, warmup, steps):
    rates = shares(kind, steps, warmup)
    assert max(rates) == 1.0
    assert rates.count(1.0) == 1
    assert min(rates) > 0


def test_what_may_be_asked_for_is_what_there_is():
    assert tuple(SCHEDULES) == TrainingSpec.CHOICES["schedule"]
