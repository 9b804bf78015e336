"""What binding an encoder-decoder model changes in it, and what it leaves."""

from __future__ import annotations

import copy

import pytest
import torch

from prefix_store.geometry import Stack
from prefix_store.model import sites
from server.engine import self_test
from server.engine.attention import plain
from server.engine.attention.work import Mask, Part, WorkItem
from server.engine.encoder_decoder import Given, Idle, Selected
from server.engine.engine import Engine, choose_slots
from server.engine.kv_pool import bytes_per_slot
from server.engine.linear import PackedLinear
from server.engine.siblings import NAMES, Sibling
from server.scheduler.limits import Limits
from tests.models import CONTEXT, ENCODER_DECODERS, tiny_frozen, tiny_model

LIMITS = Limits(2048, 8, 64, CONTEXT, 16)


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_linear_layers_of_both_stacks_and_the_head_are_packed(family):
    served = tiny_frozen(family)
    count = sum(type(module) is torch.nn.Linear for module in served.model.modules())
    engine = Engine(served, LIMITS)
    for stack in (served.model.get_encoder(), served.model.get_decoder()):
        assert any(type(module) is PackedLinear for module in stack.modules())
    head = served.model.get_output_embeddings()
    assert isinstance(head, Selected)
    assert isinstance(head.__dict__["plain"], PackedLinear)
    packed = sum(type(module) in (PackedLinear, Sibling, Idle) for module in served.model.modules())
    assert packed == count - 1  # all but the head, which stands behind `Selected`
    joined = {
        sites.of(module).stack
        for module in served.model.modules()
        for names in NAMES
        if type(getattr(module, names[0], None)) is Sibling
    }
    assert joined == {Stack.SELF, Stack.ENCODER}
    told = sum(isinstance(module, Given) for module in served.model.modules())
    assert told == (0 if served.is_relative else 2)
    assert engine.runner.windows == {0}


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_a_step_that_reads_no_source_makes_nothing_of_one(family):
    """Keys and values of every layer are what the source's, and nothing's, projections say; nothing's are made once."""
    served = tiny_frozen(family)
    runner = Engine(served, LIMITS).runner
    nothing = runner._nothing
    layers = [layer for layer in served.model.modules() if isinstance(layer, Idle)]
    assert len(layers) == 4 * served.geometry.layers
    calls: list[torch.Tensor] = []
    for layer in layers:
        layer.plain.register_forward_hook(lambda *call: calls.append(call[1][0]))
    crossing = [layer for layer in layers if layer._made is not None]
    assert len(crossing) == 2 * served.geometry.layers  # the self-test has decoded
    source = torch.randn(1, 1, nothing.shape[-1])  # as long as nothing is
    for layer in crossing:
        assert torch.equal(layer(nothing), layer.plain(nothing))
        calls.clear()
        layer(nothing)
        assert not calls
        assert torch.equal(layer(source), layer.plain(source))
        assert [call is source for call in calls] == [True, True]


@pytest.mark.parametrize("family", ["t5", "t5_gated"])
@torch.no_grad()
def test_the_tables_of_relative_positions_are_t5s_own(family):
    model = tiny_model(family)
    sites.mark(model)
    served = tiny_frozen(family)
    runner = Engine(served, LIMITS).runner
    for module in model.modules():
        if not getattr(module, "has_relative_attention_bias", False):
            continue
        table = runner._biases[sites.of(module).stack]
        whole = module.compute_bias(90, 90)[0]
        item = WorkItem(Part.OWN, Mask.FULL, 0, 4, 0, 80, 61, 5)
        assert torch.equal(plain.relative(item, table), whole[:, 61:65, 5:85])
        assert not torch.equal(plain.relative(item, table), whole[:, 60:64, 5:85])
    assert set(runner._biases) == {Stack.SELF, Stack.ENCODER}


def test_the_self_test_sees_each_stack_in_anothers_place(monkeypatch):
    """Its prefixes are in all stacks, so a server that mixed them up would not start."""
    for family in ("bart", "t5"):
        frozen = tiny_frozen(family)
        truths = self_test.plain_truths(copy.deepcopy(frozen))
        engine = Engine(frozen, LIMITS)
        self_test.check(engine.runner, truths)
        for name in ("tensor", "cross", "encoder"):
            wrong = [_swapped(truth, name) for truth in truths]
            with pytest.raises(self_test.ModelUnsupported, match="differ from the plain model"):
                self_test.check(engine.runner, wrong)


def _swapped(truth, name):
    """Keys and values of one stack in the opposite order of tokens."""
    if truth.prefix is None or truth.prefix.virtual_tokens == 1:
        return truth
    kv = getattr(truth.prefix, name).roll(1, 0)
    return self_test.replace(truth, prefix=self_test.replace(truth.prefix, **{name: kv}))


def test_a_slot_has_room_for_the_encoders_keys_too():
    geometry = tiny_frozen("bart").geometry
    assert bytes_per_slot(geometry, torch.float32) == 4 * (2 * 3 * 48 + 2 * 2 * 48)
    frozen = tiny_frozen("bart")
    least = choose_slots(frozen, rows=4, budget_bytes=1)
    assert least >= 3 * CONTEXT  # source, answer, and a prefix in front of the source's part of the cross-attention
