from __future__ import annotations

from itertools import count

import pytest
import torch

from prefix_store.jobs import TrainingSpec
from prefix_store.model import apply
from prefix_store.prefix import Method, Window
from tests.models import BOS, tiny_frozen
from trainer.methods.prefix import DirectKV

FROZEN = apply.attach(tiny_frozen("llama"))
P = 4


def spec(**options) -> TrainingSpec:
    return TrainingSpec("0" * 64, 1, **{"virtual_tokens": P, **options})


def one_step(method: DirectKV, rate: float) -> None:
    ids = torch.arange(2, 14).reshape(2, 6)
    optimiser = torch.optim.AdamW(method.parameters(), lr=rate, weight_decay=0.0)
    apply.logits(FROZEN, ids, torch.ones_like(ids), method.rows(2)).square().mean().backward()
    optimiser.step()


def test_it_starts_as_the_text_in_context():
    method = DirectKV(FROZEN, spec(), [9, 8, 7, 6, 5])
    assert torch.equal(method.kv(), apply.prefill_kv(FROZEN, [BOS, 9, 8, 7]))
    assert method.rows(3).offset.tolist() == [P] * 3


def test_a_step_moves_every_number_by_the_rate_in_units_of_its_layers_spread():
    method = DirectKV(FROZEN, spec(), count(2))
    before = method.kv().detach()
    one_step(method, 0.01)
    moved = (method.kv().detach() - before)[:, :, :, 1:]
    spread = before[:, :, :, 1:].std(dim=(2, 3, 4))
    torch.testing.assert_close(moved.abs().amax(dim=(2, 3, 4)), 0.01 * spread, rtol=1e-3, atol=0.0)
    assert len(set(spread.flatten().tolist())) == spread.numel(), "keys and values of each layer have their own"


def test_the_first_token_stays_as_it_was():
    method = DirectKV(FROZEN, spec(), count(2))
    before = method.kv().detach()
    one_step(method, 0.5)
    assert torch.equal(method.kv()[:, :, :, 0], before[:, :, :, 0])
    assert not torch.equal(method.kv(), before)


@pytest.mark.parametrize(("frozen_tokens", "kept"), [(0, 0), (2, 2), (9, P - 1)])
def test_more_or_fewer_of_the_first_tokens_may_stay(frozen_tokens, kept):
    method = DirectKV(FROZEN, spec(frozen_tokens=frozen_tokens), count(2))
    before = method.kv().detach()
    one_step(method, 0.5)
    same = (method.kv() == before).flatten(0, 2).all(dim=2).all(dim=0)
    assert same.tolist() == [token < kept for token in range(P)]


def test_a_single_virtual_token_is_tuned():
    method = DirectKV(FROZEN, spec(virtual_tokens=1), count(2))
    before = method.kv().detach()
    one_step(method, 0.01)
    assert (method.kv() != before).all()


def test_every_layer_gets_a_gradient():
    method = DirectKV(FROZEN, spec(), count(2))
    one_step(method, 0.01)
    assert method.layers_without_gradient() == []
    assert method.delta.grad.flatten(1).any(dim=1).all()


def test_what_is_kept_is_keys_and_values_that_never_slide_away():
    method = DirectKV(FROZEN, spec(), count(2))
    assert (method.manifest().method, method.manifest().window) == (Method.PREFIX, Window.ALWAYS)
    assert torch.equal(method.tensors()["self.kv"], method.kv())
