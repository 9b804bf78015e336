import dataclasses

import pytest
import torch

from prefix_store.errors import InvalidPrefix, PrefixMismatch
from prefix_store.geometry import Stack
from prefix_store.prefix import Method
from prefix_store.tensors import LARGEST, check_fits, shapes, validate
from tests.prefix_store.samples import BOTH, GEOMETRY, manifest, tensors


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (Method.PREFIX, {"self.kv": (2, 2, 2, 5, 3)}),
        (Method.TEXT, {"self.kv": (2, 2, 2, 5, 3)}),
        (Method.PROMPT, {"embeds": (5, 12)}),
        (Method.PREFIX_PLUS, {"memory": (2, 4, 3, 3)}),
    ],
)
def test_shapes(method, expected):
    assert shapes(manifest(method)) == expected


def test_shapes_of_an_encoder_decoder_models_stacks():
    assert shapes(manifest(geometry=BOTH, stacks=tuple(Stack))) == {
        "self.kv": (3, 2, 4, 5, 3),
        "cross.kv": (3, 2, 4, 5, 3),
        "encoder.kv": (2, 2, 2, 5, 6),
    }
    assert list(shapes(manifest(geometry=BOTH, stacks=(Stack.CROSS,)))) == ["cross.kv"]


def test_a_stack_more_or_less_is_refused():
    of = manifest(geometry=BOTH, stacks=(Stack.SELF, Stack.ENCODER))
    sound = tensors(of)
    validate(of, sound)
    for bad in ({**sound, "cross.kv": sound["self.kv"]}, {"self.kv": sound["self.kv"]}):
        with pytest.raises(InvalidPrefix, match=r"expected the tensors 'self.kv' and 'encoder.kv', got"):
            validate(of, bad)
    with pytest.raises(InvalidPrefix, match=r"encoder.kv: expected shape \[2, 2, 2, 5, 6\]"):
        validate(of, {**sound, "encoder.kv": sound["self.kv"]})
    with pytest.raises(InvalidPrefix, match=r"encoder.kv: every value must be finite"):
        validate(of, {**sound, "encoder.kv": sound["encoder.kv"] * torch.nan})


@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sound_tensors_pass(method, dtype):
    validate(manifest(method), tensors(manifest(method), dtype=dtype))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 2 * LARGEST, -2 * LARGEST])
def test_one_bad_value_anywhere_is_refused(value):
    bad = tensors(manifest())
    bad["self.kv"][-1, -1, -1, -1, -1] = value
    with pytest.raises(InvalidPrefix, match="finite"):
        validate(manifest(), bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({}, "expected the tensor 'self.kv', got \\[\\]"),
        ({"memory": torch.zeros(1)}, "got \\['memory'\\]"),
        ({"self.kv": torch.zeros(2, 2, 2, 5, 3), "more": torch.zeros(1)}, "more"),
        ({"self.kv": torch.zeros(2, 2, 2, 3, 5)}, "expected shape \\[2, 2, 2, 5, 3\\], got \\[2, 2, 2, 3, 5\\]"),
        ({"self.kv": torch.zeros(2, 2, 2, 5, 3, dtype=torch.float64)}, "float64"),
    ],
)
def test_validate_says_what_was_expected_and_what_came(bad, message):
    with pytest.raises(InvalidPrefix, match=message):
        validate(manifest(), bad)


def test_a_prefix_of_the_same_model_fits():
    check_fits(manifest(base_digest="a" * 64), GEOMETRY, "a" * 64, context_length=7)
    check_fits(manifest(), GEOMETRY, "a" * 64, context_length=7)


def test_another_geometry_does_not_fit():
    other = dataclasses.replace(GEOMETRY, layers=3)
    with pytest.raises(PrefixMismatch, match="layers: expected 3, got 2"):
        check_fits(manifest(), other, "a" * 64, context_length=100)


def test_another_base_model_does_not_fit():
    with pytest.raises(PrefixMismatch, match="base_digest"):
        check_fits(manifest(base_digest="b" * 64), GEOMETRY, "a" * 64, context_length=100)


def test_a_memory_fits_no_encoder_decoder_model():
    with pytest.raises(PrefixMismatch, match="not defined"):
        check_fits(manifest(Method.PREFIX_PLUS, geometry=BOTH), BOTH, "a" * 64, context_length=100)


def test_a_prefix_must_leave_room_for_a_prompt_and_a_token():
    with pytest.raises(PrefixMismatch, match="no room"):
        check_fits(manifest(), GEOMETRY, "a" * 64, context_length=6)
