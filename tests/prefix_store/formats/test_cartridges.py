import dataclasses

import pytest
import torch

from prefix_store.errors import InvalidPrefix, PrefixMismatch
from prefix_store.formats import cartridges, pickled
from tests.models import tiny_frozen
from tests.prefix_store import foreign

GEOMETRY = tiny_frozen("llama").geometry


@pytest.fixture
def lists(tmp_path):
    foreign.cartridge(tmp_path / "cache.pt", GEOMETRY, 6)
    return pickled.load(tmp_path / "cache.pt")


@pytest.mark.parametrize("fixed", [0, 1, 3])
def test_fixed_tokens_stand_in_front_of_the_trained_ones(tmp_path, fixed):
    expected = foreign.cartridge(tmp_path / "cache.pt", GEOMETRY, 6, fixed=fixed)
    manifest, tensors = pickled.read(tmp_path / "cache.pt", "cartridge", GEOMETRY)
    assert torch.equal(tensors["self.kv"], expected)
    assert (manifest.virtual_tokens, manifest.position_offset) == (6, 6)


def test_the_dtype_is_kept(lists):
    half = {name: [tensor.bfloat16() for tensor in layers] for name, layers in lists.items()}
    assert cartridges.read(half, GEOMETRY)[1]["self.kv"].dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"trainable_keys": []}, PrefixMismatch, "trainable_keys: expected 3 layers, got 0"),
        ({"fixed_values": [torch.zeros(1, 2, 1, 8)]}, PrefixMismatch, "fixed_values: expected 3 layers, got 1"),
        ({"fixed_values": []}, InvalidPrefix, "expected keys and values for the same tokens, got 6 and 5"),
        ({"fixed_keys": [torch.zeros(1, 2, 1, 4)] * 3}, PrefixMismatch, "expected shape \\[1, 2, 1, 8\\], got"),
        ({"fixed_keys": [torch.zeros(2, 2, 1, 8)] * 3}, PrefixMismatch, "got \\[2, 2, 1, 8\\] in layer 0"),
        ({"fixed_keys": [torch.zeros(3)] * 3}, PrefixMismatch, "got \\[3\\] in layer 0"),
        (
            {"fixed_keys": [torch.zeros(1, 2, n, 8) for n in (1, 1, 2)]},
            PrefixMismatch,
            "got \\[1, 2, 2, 8\\] in layer 2",
        ),
        ({"fixed_keys": [torch.full((1, 2, 1, 8), torch.nan)] * 3}, InvalidPrefix, "finite"),
        ({"more": []}, InvalidPrefix, "expected fixed_keys, fixed_values, trainable_keys, trainable_values"),
    ],
)
def test_what_is_no_cartridge_of_this_model_is_refused(lists, change, error, message):
    with pytest.raises(InvalidPrefix, match=message) as caught:
        cartridges.read(lists | change, GEOMETRY)
    assert type(caught.value) is error


def test_another_model_s_is_refused(lists):
    for field in ("layers", "kv_heads", "head_dim"):
        other = dataclasses.replace(GEOMETRY, **{field: getattr(GEOMETRY, field) + 1})
        with pytest.raises(PrefixMismatch):
            cartridges.read(lists, other)
