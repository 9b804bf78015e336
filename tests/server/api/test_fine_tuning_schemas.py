from typing import Any

import pytest

from prefix_store.errors import InvalidRequest
from prefix_store.jobs import BUILT_IN_METHODS, DEFAULTS, TrainingSpec
from server.api.fine_tuning_schemas import FineTuningBody, default_rate

NEEDED = {"model": "m", "training_file": "f"}


def options(**body: Any) -> dict[str, Any]:
    return FineTuningBody.model_validate({**NEEDED, **body}).options()


def test_nothing_that_is_not_asked_for_is_an_option() -> None:
    assert options() == {}
    assert options(antefix={}, hyperparameters={"n_epochs": "auto"}, method={"type": "supervised"}) == {}
    assert options(hyperparameters=None, method=None, antefix=None, seed=None, unknown=[1]) == {}


def test_each_place_has_its_options() -> None:
    asked = {"n_epochs": 2, "batch_size": 3, "learning_rate_multiplier": 2.0}
    expected = {"epochs": 2, "batch_size": 3, "learning_rate": 0.6, "method": "prompt", "seed": 9}
    for place in ({"hyperparameters": asked}, {"method": {"supervised": {"hyperparameters": asked}}}):
        assert options(**place, antefix={"method": "prompt"}, seed=9) == expected


@pytest.mark.parametrize(
    "body",
    [
        {"seed": 1, "antefix": {"seed": 2}},
        {"hyperparameters": {"batch_size": 1}, "antefix": {"batch_size": 2}},
        {"hyperparameters": {"batch_size": 1}, "method": {"supervised": {"hyperparameters": {"batch_size": 2}}}},
        {"hyperparameters": {"learning_rate_multiplier": 2}, "antefix": {"learning_rate": 0.1}},
    ],
)
def test_what_is_given_twice_must_agree(body: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="contradicts "):
        options(**body)


def test_the_rate_that_is_multiplied_is_the_one_a_job_would_have() -> None:
    for method in (*BUILT_IN_METHODS, "of_ones_own"):
        rate = DEFAULTS.get(method, {}).get("learning_rate", TrainingSpec.learning_rate)
        assert (
            default_rate(method)
            == rate
            == options(antefix={"method": method}, hyperparameters={"learning_rate_multiplier": 1})["learning_rate"]
        )
