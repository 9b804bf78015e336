import json
import math
from pathlib import Path

import pytest

from prefix_store.errors import InvalidRequest
from prefix_store.geometry import Stack
from prefix_store.jobs import TRANSITIONS, JobStatus, Objective, TrainingSpec, method_files
from tests.prefix_store.samples import SPEC


def test_every_status_has_its_transitions():
    assert set(TRANSITIONS) == set(JobStatus)


def test_final_statuses():
    assert {status for status in JobStatus if status.is_final} == {"succeeded", "failed", "cancelled"}


def test_spec_survives_json():
    spec = TrainingSpec(
        "d" * 64, 3, "low_rank", Objective.DISTIL, init_text="Hello", template="{prompt}.", seed=7, unset=("steps",),
        context="A text.",
    )  # fmt: skip
    assert TrainingSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_a_spec_stored_when_methods_were_few_still_reads():
    stored = """{"data_digest": "d", "examples": 3, "method": "prefix", "objective": "lm", "virtual_tokens": 16,
        "steps": 200, "batch_size": 8, "learning_rate": 0.1, "max_length": 256, "init_text": null, "seed": 0,
        "base_digest": null}"""
    assert TrainingSpec.from_json(json.loads(stored)) == TrainingSpec("d", 3)


def test_method_files_are_named_after_their_stems():
    home = str(Path.home())
    named = {"a": Path("a.py"), "low_rank2": Path("x/low_rank2.py"), "c": Path(home, "c.py")}
    assert method_files(" a.py,x/low_rank2.py , ~/c.py,") == named
    assert method_files("") == {}


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("mine", "mine: must be called NAME.py"),
        ("mine.txt", "mine.txt: must be called NAME.py"),
        ("ok.py,My.py", "My.py: must be called"),
        ("2.py", "must be called"),
        ("a-b.py", "must be called"),
        (f"{'a' * 33}.py", "must be called"),
        ("x/prefix.py", "x/prefix.py: 'prefix' is a method that is built in"),
        ("a.py,b/a.py", "b/a.py: a.py already has that name"),
    ],
)
def test_a_method_file_with_a_bad_name_is_refused(setting, reason):
    with pytest.raises(ValueError, match=reason):
        method_files(setting)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", None),
        ("method", ["prefix"]),
        ("method", "Low Rank"),
        ("method", ""),
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
        ("init_from", 3),
        ("context", 3),
        ("context", "a text"),
        ("init", "zeros"),
        ("init", ["text"]),
        ("schedule", "step"),
        ("feature_map", None),
        ("warmup", 1.1),
        ("warmup", -0.1),
        ("weight_decay", -1),
        ("weight_decay", 10.5),
        ("bottleneck", 0),
        ("frozen_tokens", -1),
        ("examples", 0),
        ("patience", -1),
        ("publish_anyway", 1),
        ("stacks", ()),
        ("stacks", "self"),
        ("stacks", ["self", "self"]),
        ("stacks", ["middle"]),
    ],
)
def test_spec_names_the_field_it_refuses(field, value):
    with pytest.raises(InvalidRequest) as caught:
        TrainingSpec(**{**SPEC.to_json(), field: value})
    assert caught.value.param == field


def test_one_set_of_stacks_is_one_specification():
    spec = TrainingSpec("d" * 64, 1, stacks=["encoder", "self"])
    assert spec.stacks == (Stack.SELF, Stack.ENCODER)
    assert TrainingSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_bounds_are_inclusive():
    TrainingSpec("d" * 64, 1, virtual_tokens=4096, steps=1, learning_rate=10, seed=2**63 - 1)
    TrainingSpec("d" * 64, 1, learning_rate=0.1, weight_decay=10, warmup=1)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"init_text": "a", "init_from": "b"}, "init_from"),
        ({"init_text": "a", "init": "random_tokens"}, "init"),
        ({"learning_rate": 10, "weight_decay": 0.2}, "weight_decay"),
        ({"method": "prefix_plus"}, "virtual_tokens"),
        ({"objective": Objective.DISTIL}, "context"),
        ({"method": "prompt", "virtual_tokens": 0}, "virtual_tokens"),
    ],
)
def test_what_does_not_go_together_is_refused(fields, param):
    with pytest.raises(InvalidRequest) as caught:
        TrainingSpec("d" * 64, 1, **fields)
    assert caught.value.param == param
