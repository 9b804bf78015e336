import dataclasses

import pytest

from prefix_store.geometry import ModelGeometry
from tests.prefix_store.samples import GEOMETRY


def test_shapes():
    assert GEOMETRY.kv_shape == (2, 2, 2, 3)
    assert GEOMETRY.kv_numbers_per_token == 2 * 2 * 2 * 3


def test_json_round_trip():
    assert ModelGeometry.from_json(GEOMETRY.to_json()) == GEOMETRY


@pytest.mark.parametrize(
    "change",
    [{"layers": 0}, {"layers": True}, {"layers": 2.0}, {"kv_heads": "2"}, {"head_dim": 2**31}, {"family": 7}, {"x": 1}],
)
def test_from_json_refuses(change):
    with pytest.raises(ValueError, match="geometry"):
        ModelGeometry.from_json({**GEOMETRY.to_json(), **change})


@pytest.mark.parametrize("data", [None, [], {}, {"family": "llama"}])
def test_from_json_refuses_what_is_not_a_geometry(data):
    with pytest.raises(ValueError, match="exactly the fields"):
        ModelGeometry.from_json(data)


def test_differences_name_expected_and_got():
    other = dataclasses.replace(GEOMETRY, layers=24, family="gpt2")
    assert GEOMETRY.differences(GEOMETRY) == []
    assert GEOMETRY.differences(other) == ["family: expected llama, got gpt2", "layers: expected 2, got 24"]
