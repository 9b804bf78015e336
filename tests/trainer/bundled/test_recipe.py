import pytest

from trainer.bundled.recipe import Budget, Recipe

RECIPE = Recipe(windows=((0.0, 16), (0.5, 32)), rates=((0.0, 1.0), (0.5, 1.0), (1.0, 0.0)), warmup_steps=4)


def test_rate_warms_up_stays_and_falls():
    rates = [RECIPE.rate(progress, step) for progress, step in ((0, 0), (0.1, 9), (0.5, 50), (0.75, 75), (1, 99))]
    assert rates == [0.25, 1.0, 1.0, 0.5, 0.0]


def test_windows_grow_with_progress():
    assert [RECIPE.window(progress) for progress in (0.0, 0.49, 0.5, 1.0)] == [16, 16, 32, 32]


def test_progress_is_of_steps_if_given_and_else_of_time():
    assert Budget(minutes=2, steps=8).progress(step=2, elapsed=119) == 0.25
    assert Budget(minutes=2).progress(step=2, elapsed=30) == pytest.approx(0.25)
