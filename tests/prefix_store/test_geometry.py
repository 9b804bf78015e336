import dataclasses

import pytest

from prefix_store.geometry import EncoderGeometry, ModelGeometry, Stack
from tests.prefix_store.samples import BOTH, GEOMETRY


def test_shapes():
    assert GEOMETRY.kv_shape == (2, 2, 2, 3)
    assert GEOMETRY.kv_numbers_per_token == 2 * 2 * 2 * 3


def test_the_stacks_of_an_encoder_decoder_model():
    assert GEOMETRY.stacks == (Stack.SELF,)
    assert {stack: BOTH.kv_shape_of(stack) for stack in BOTH.stacks} == {
        Stack.SELF: (3, 2, 4, 3),
        Stack.CROSS: (3, 2, 4, 3),
        Stack.ENCODER: (2, 2, 2, 6),
    }


@pytest.mark.parametrize("geometry", [GEOMETRY, BOTH])
def test_json_round_trip(geometry):
    assert ModelGeometry.from_json(geometry.to_json()) == geometry


def test_a_model_without_an_encoder_does_not_speak_of_one():
    assert "encoder" not in GEOMETRY.to_json()
    assert BOTH.to_json()["encoder"] == {"layers": 2, "heads": 2, "head_dim": 6}


@pytest.mark.parametrize(
    "change",
    [{"layers": 0}, {"layers": True}, {"layers": 2.0}, {"kv_heads": "2"}, {"head_dim": 2**31}, {"family": 7}, {"x": 1}],
)
def test_from_json_refuses(change):
    with pytest.raises(ValueError, match="geometry"):
        ModelGeometry.from_json({**GEOMETRY.to_json(), **change})


@pytest.mark.parametrize("encoder", [None, {}, {"layers": 2}, {"layers": 2, "heads": 0, "head_dim": 6}, [2, 2, 6]])
def test_from_json_refuses_a_wrong_encoder(encoder):
    with pytest.raises(ValueError, match=r"geometry\.encoder"):
        ModelGeometry.from_json({**BOTH.to_json(), "encoder": encoder})


@pytest.mark.parametrize("data", [None, [], {}, {"family": "llama"}])
def test_from_json_refuses_what_is_not_a_geometry(data):
    with pytest.raises(ValueError, match="exactly the fields"):
        ModelGeometry.from_json(data)


def test_differences_name_expected_and_got():
    other = dataclasses.replace(GEOMETRY, layers=24, family="gpt2")
    assert GEOMETRY.differences(GEOMETRY) == []
    assert GEOMETRY.differences(other) == ["family: expected llama, got gpt2", "layers: expected 2, got 24"]
    bare = dataclasses.replace(BOTH, encoder=None)
    (difference,) = BOTH.differences(bare)
    assert "encoder: expected {'layers': 2" in difference
    assert difference.endswith("got None")
    assert BOTH.differences(dataclasses.replace(BOTH, encoder=EncoderGeometry(2, 4, 6)))
