import copy

import pytest

from prefix_store.geometry import Stack
from prefix_store.model import sites
from prefix_store.model.sites import Site
from tests.models import ENCODER_DECODERS, tiny_frozen

ALL = {Site(stack, layer) for stack, layers in (("self", 3), ("cross", 3), ("encoder", 2)) for layer in range(layers)}


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_every_attention_has_a_site_of_its_own(family):
    model = tiny_frozen(family).model
    for tree in (model, copy.deepcopy(model)):
        found = [sites.of(module) for module in tree.modules() if hasattr(module, "layer_idx")]
        assert set(found) == ALL
        assert len(found) == len(ALL)


@pytest.mark.parametrize(
    ("family", "name"),
    [("bart", "model.decoder.layers.1.encoder_attn"), ("t5", "decoder.block.1.layer.1.EncDecAttention")],
)
def test_cross_attention_is_known(family, name):
    assert sites.of(tiny_frozen(family).model.get_submodule(name)) == Site(Stack.CROSS, 1)


def test_in_a_decoder_only_model_all_is_its_own():
    model = tiny_frozen("llama").model
    found = [sites.of(module) for module in model.modules() if hasattr(module, "layer_idx")]
    assert found == [Site(Stack.SELF, layer) for layer in range(3)]


def test_marking_leaves_no_hook_behind():
    model = tiny_frozen("t5").model
    assert not any(module._forward_pre_hooks for module in model.modules())
