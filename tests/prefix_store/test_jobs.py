import json
import math

import pytest

from prefix_store.errors import InvalidRequest
from prefix_store.jobs import TRANSITIONS, JobStatus, Objective, TrainingSpec
from prefix_store.prefix import Method
from tests.prefix_store.samples import SPEC


def test_every_status_has_its_transitions():
    assert set(TRANSITIONS) == set(JobStatus)


def test_final_statuses():
    assert {status for status in JobStatus if status.is_final} == {"succeeded", "failed", "cancelled"}


def test_spec_survives_json():
    spec = TrainingSpec("d" * 64, 3, Method.PREFIX_PLUS, Objective.DISTIL, init_text="Hello", seed=7)
    assert TrainingSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("virtual_tokens", 0),
        ("virtual_tokens", 4097),
        ("steps", 0),
        ("steps", 2.5),
        ("steps", True),
        ("steps", "9"),
        ("batch_size", None),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("learning_rate", 0),
        ("max_length", 1),
        ("seed", -1),
        ("seed", 2**63),
        ("init_text", 3),
        ("examples", 0),
    ],
)
def test_spec_names_the_field_it_refuses(field, value):
    with pytest.raises(InvalidRequest) as caught:
        TrainingSpec(**{**SPEC.to_json(), field: value})
    assert caught.value.param == field


def test_bounds_are_inclusive():
    TrainingSpec("d" * 64, 1, virtual_tokens=4096, steps=1, learning_rate=10, seed=2**63 - 1)
