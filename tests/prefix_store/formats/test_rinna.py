import pytest
import torch

from prefix_store.errors import PrefixMismatch
from prefix_store.formats import pickled, rinna
from prefix_store.prefix import Window
from tests.models import tiny_frozen
from tests.prefix_store import foreign

GEOMETRY = tiny_frozen("gpt_neox").geometry


@pytest.mark.parametrize("legacy", [False, True])
def test_a_bare_tensor_is_the_prefix(tmp_path, legacy):
    path = tmp_path / "smileface_suffix.task0.weight"
    expected = foreign.rinna(path, GEOMETRY, 10, legacy=legacy)
    manifest, tensors = pickled.read(path, "rinna", GEOMETRY)
    assert torch.equal(tensors["self.kv"], expected)
    assert not torch.equal(tensors["self.kv"].flip(1), expected)  # keys and values are not exchanged
    assert not tensors["self.kv"].requires_grad
    assert (manifest.virtual_tokens, manifest.position_offset, manifest.window) == (10, 10, Window.SLIDES)
    assert manifest.base_digest is None


def test_another_model_s_is_refused():
    with pytest.raises(PrefixMismatch, match="288 columns, got 18432"):
        rinna.read(torch.zeros(10, 18432), GEOMETRY)
