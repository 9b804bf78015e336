from __future__ import annotations

import torch

from prefix_store.geometry import Stack
from prefix_store.model.rows import PrefixRows, StackRows, stacked
from prefix_store.prefix import Window

CPU = torch.device("cpu")


def kv(length: int, fill: float) -> torch.Tensor:
    return torch.full((3, 2, 4, length, 6), fill)


def test_parts_are_padded_to_the_longest_of_each_stack():
    parts = [
        StackRows.shared({Stack.SELF: kv(2, 1.0), Stack.ENCODER: kv(2, 2.0)}, 2, 2),
        StackRows.shared({Stack.SELF: kv(5, 3.0)}, 1, 0),
        StackRows.bare(1, CPU),
    ]
    found = StackRows.joined(parts)
    assert set(found.stacks) == {Stack.SELF, Stack.ENCODER}
    assert found.offset.tolist() == [2, 2, 0, 0]
    assert found.embeds is None
    own, encoder = found.stacks[Stack.SELF], found.stacks[Stack.ENCODER]
    assert own.kv.shape == (4, 3, 2, 4, 5, 6)
    assert own.back.tolist() == [2, 2, 5, 0]
    assert encoder.back.tolist() == [2, 2, 0, 0]
    assert own.kv[2].unique().tolist() == [3.0]
    assert own.kv[1, ..., :2, :].unique().tolist() == [1.0]
    assert not own.kv[1, ..., 2:, :].any()


def test_soft_prompts_touch_their_source():
    parts = [StackRows.prompt(torch.ones(3, 6), 1), StackRows.prompt(torch.ones(1, 6), 1), StackRows.bare(1, CPU)]
    found = StackRows.joined(parts)
    assert found.embeds is not None
    assert found.valid is not None
    assert found.valid.tolist() == [[True] * 3, [False, False, True], [False] * 3]
    assert (found.embeds.any(2) == found.valid).all()


def test_a_gradient_comes_back_to_each_part():
    tuned = [kv(length, 1.0).requires_grad_() for length in (2, 4)]
    parts = [StackRows.shared({Stack.CROSS: one}, 3, 0) for one in tuned]
    rows = StackRows.joined(parts).stacks[Stack.CROSS]
    (rows.kv * rows.valid[:, None, None, None, :, None]).sum().backward()
    assert [one.grad.unique().tolist() for one in tuned if one.grad is not None] == [[3.0], [3.0]]


def test_rows_of_a_decoder_are_its_own_stack():
    own = PrefixRows.shared(kv(2, 1.0), 3, 2, Window.ALWAYS)
    found = stacked(own, 3, CPU)
    assert found.stacks == {Stack.SELF: own}
    assert found.offset is own.offset
    assert stacked(found, 3, CPU) is found
    assert (stacked(None, 2, CPU).stacks, stacked(None, 2, CPU).offset.tolist()) == ({}, [0, 0])
