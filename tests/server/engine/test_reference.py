"""A second tree of modules computes what the model computed before an engine took it over, and shares its weights."""

from __future__ import annotations

import pytest
import torch

from prefix_store.model import apply
from prefix_store.prefix import Window
from server.engine import int8_linear, reference
from server.engine.engine import Engine
from server.engine.linear import PackedLinear
from server.engine.siblings import Sibling
from server.scheduler.scheduler import Limits
from tests.models import ENCODER_DECODERS, FAMILIES, random_kv, tiny_frozen, tiny_model

LIMITS = Limits(slots=512, rows=4, step_tokens=32, context_length=128, waiting=4)
IDS = torch.tensor([[5, 60, 7, 200, 31]])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_it_is_the_plain_model(family):
    served = tiny_frozen(family)
    Engine(served, LIMITS)
    before = torch.stack([p.sum() for p in served.model.parameters()]).sum()
    plain = reference.plain(served).model
    assert plain.config._attn_implementation == "eager"
    assert (plain(IDS).logits - tiny_model(family)(IDS).logits).abs().max() < 1e-5
    rows = apply.PrefixRows.shared(random_kv(served, 3), 1, 3, Window.ALWAYS)
    again = apply.logits(reference.attached(served), IDS, torch.ones_like(IDS), rows)
    expected = apply.logits(apply.attach(tiny_frozen(family)), IDS, torch.ones_like(IDS), rows)
    assert (again - expected).abs().max() < 1e-5
    assert (plain(IDS).logits - again).abs().max() > 1e-2
    assert served.model.config._attn_implementation == "antefix"
    assert torch.stack([p.sum() for p in served.model.parameters()]).sum() == before


@pytest.mark.parametrize("family", ENCODER_DECODERS)
@torch.no_grad()
def test_it_is_the_plain_model_with_an_encoder_too(family):
    served = tiny_frozen(family)
    engine = Engine(served, LIMITS)
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}
    plain, expected = reference.plain(served).model, tiny_model(family)(**inputs).logits
    assert (plain(**inputs).logits - expected).abs().max() < 1e-5
    kinds = {type(module).__name__ for module in engine.runner.frozen.model.modules()}
    assert "Selected" in kinds
    assert not {"Selected", "Given", "PackedLinear"} & {type(module).__name__ for module in plain.modules()}


def test_it_has_no_weight_of_its_own():
    served = tiny_frozen("llama")
    mine = {parameter.data_ptr() for parameter in served.model.parameters()}
    Engine(served, LIMITS)
    plain = reference.plain(served).model
    assert {parameter.data_ptr() for parameter in plain.parameters()} <= mine
    layers = [m.siblings.product if isinstance(m, Sibling) else m for m in served.model.modules()]
    packed = [layer for layer in layers if isinstance(layer, PackedLinear)]
    unpacked = [module for module in plain.modules() if isinstance(module, reference.UnpackedLinear)]
    assert [module.__dict__["layer"] for module in unpacked] == packed
    assert not any(isinstance(module, PackedLinear) for module in plain.modules())
    assert packed


def test_it_says_what_it_computes_with():
    served = tiny_frozen("llama")
    assert reference.weights(served) == "the float32 weights as they were loaded"
    if not int8_linear.works():
        pytest.skip("no exact int8 product on this machine")
    served.model.to(torch.bfloat16)
    Engine(served, LIMITS, int8=True)
    assert reference.weights(served) == "the int8 linear layers that are served; bfloat16 elsewhere"
    assert reference.plain(served).model(IDS).logits.isfinite().all()
