import dataclasses

import pytest
import torch

from prefix_store.errors import InvalidPrefix, PrefixMismatch
from prefix_store.formats import flat
from prefix_store.prefix import Method, Window
from tests.prefix_store.samples import GEOMETRY, LENGTH

COLUMNS = GEOMETRY.kv_numbers_per_token
ROWS = torch.arange(LENGTH * COLUMNS, dtype=torch.float32).view(LENGTH, COLUMNS)


def test_every_number_stands_where_the_layout_says():
    manifest, tensors = flat.read(ROWS, GEOMETRY, "x")
    layers, pair, heads, size = GEOMETRY.kv_shape
    for layer, which, head in torch.cartesian_prod(*(torch.arange(n) for n in (layers, pair, heads))).tolist():
        begin = (2 * layer + which) * heads * size + head * size
        assert torch.equal(tensors["self.kv"][layer, which, head], ROWS[:, begin : begin + size])
    assert (manifest.method, manifest.window) == (Method.PREFIX, Window.SLIDES)
    assert (manifest.virtual_tokens, manifest.position_offset) == (LENGTH, LENGTH)


def test_what_is_read_is_written_again():
    assert torch.equal(flat.write(flat.read(ROWS, GEOMETRY, "x")[1]["self.kv"]), ROWS)
    assert torch.equal(
        flat.read(ROWS.T.contiguous().T, GEOMETRY, "x")[1]["self.kv"], flat.read(ROWS, GEOMETRY, "x")[1]["self.kv"]
    )


@pytest.mark.parametrize(
    ("tensor", "error", "message"),
    [
        (torch.zeros(5, COLUMNS + 1), PrefixMismatch, "x: .* = 24 columns, got 25; a soft prompt has 12"),
        (torch.zeros(0, COLUMNS), InvalidPrefix, "got \\[0, 24\\]"),
        (torch.zeros(COLUMNS), InvalidPrefix, "got \\[24\\]"),
        (torch.full((5, COLUMNS), torch.inf), InvalidPrefix, "finite"),
        (torch.zeros(5, COLUMNS, dtype=torch.float64), InvalidPrefix, "got torch.float64"),
    ],
)
def test_what_does_not_fit_is_refused(tensor, error, message):
    with pytest.raises(InvalidPrefix, match=message) as caught:
        flat.read(tensor, GEOMETRY, "x")
    assert type(caught.value) is error


def test_another_model_s_prefix_is_refused():
    for field in ("layers", "kv_heads", "head_dim"):
        other = dataclasses.replace(GEOMETRY, **{field: getattr(GEOMETRY, field) + 1})
        with pytest.raises(PrefixMismatch):
            flat.read(ROWS, other, "x")
