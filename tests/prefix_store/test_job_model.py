from __future__ import annotations

import pytest

from prefix_store.errors import InvalidRequest, InvalidTrainingData
from prefix_store.job_model import check_examples, check_model
from tests.models import tiny_frozen

LLAMA, BART = (tiny_frozen(family).geometry for family in ("llama", "bart"))


@pytest.mark.parametrize(
    ("options", "geometry", "param"),
    [
        ({"stacks": ["self", "cross"]}, LLAMA, "stacks"),
        ({"stacks": ["encoder"]}, LLAMA, "stacks"),
        ({"method": "prefix_plus"}, BART, "method"),
        ({"objective": "distil", "context": "a text"}, BART, "objective"),
    ],
)
def test_what_the_model_cannot_do_is_refused(options, geometry, param):
    with pytest.raises(InvalidRequest) as caught:
        check_model(options, geometry)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("options", "geometry"),
    [
        ({}, LLAMA),
        ({"stacks": ["self"], "method": "prefix_plus", "objective": "distil"}, LLAMA),
        ({}, BART),
        ({"stacks": ["encoder", "self"], "objective": "lm"}, BART),
        ({"method": "prompt_lstm"}, BART),
        ({"stacks": ["elsewhere"]}, LLAMA),  # the specification's to refuse
    ],
)
def test_the_rest_is_not(options, geometry):
    check_model(options, geometry)


def test_an_encoder_needs_something_to_read():
    examples = [{"prompt": "a", "completion": "b"}, {"messages": []}, {"text": "c"}]
    check_examples(examples, LLAMA, "examples")
    check_examples(examples[:2], BART, "examples")
    with pytest.raises(InvalidTrainingData, match=r"example 3: expected .*, got a text") as caught:
        check_examples(examples, BART, "training_file")
    assert caught.value.param == "training_file"
