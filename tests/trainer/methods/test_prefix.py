from __future__ import annotations

from itertools import count

import pytest
import torch

from prefix_store import tensors
from prefix_store.errors import InvalidRequest
from prefix_store.jobs import TrainingSpec
from prefix_store.model import apply
from prefix_store.prefix import Method, PrefixManifest, Window
from tests.models import BOS, CONTEXT, EOS, tiny_frozen, tiny_tokenizer
from trainer.methods.prefix import DirectKV, initial_ids

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


def test_a_single_virtual_token_is_tuned():
    method = DirectKV(FROZEN, spec(virtual_tokens=1), count(2))
    before = method.kv().detach()
    one_step(method, 0.01)
    assert (method.kv() != before).all()


def test_every_layer_gets_a_gradient():
    method = DirectKV(FROZEN, spec(), count(2))
    assert method.layers_without_gradient() == [0, 1, 2]
    one_step(method, 0.01)
    assert method.layers_without_gradient() == []
    method.delta.grad[1] = 0
    assert method.layers_without_gradient() == [1]


def test_the_finished_prefix_is_a_sound_one_for_this_model():
    method = DirectKV(FROZEN, spec(), count(2))
    manifest, kept = method.manifest(), method.tensors()
    assert manifest == PrefixManifest(Method.PREFIX, FROZEN.geometry, P, P, FROZEN.digest, Window.ALWAYS)
    tensors.validate(manifest, kept)
    tensors.check_fits(manifest, FROZEN.geometry, FROZEN.digest, CONTEXT)
    before = kept["self.kv"].clone()
    one_step(method, 0.5)
    assert torch.equal(kept["self.kv"], before), "what was taken does not move with the training"


@pytest.mark.parametrize(
    ("options", "text", "ids"),
    [
        ({}, [BOS, 5, 6, EOS, BOS, 7, 8], [BOS, 5, 6, 7]),
        ({}, [5, 6], [BOS, 5, 6, 5]),
        ({"init_text": "abc"}, [5, 6], [BOS, *tiny_tokenizer(bos=False)("abc").input_ids]),
        ({"virtual_tokens": 1}, [5], [BOS]),
    ],
)
def test_the_text_to_start_from(options, text, ids):
    assert initial_ids(tiny_tokenizer(), spec(**options), text) == ids


def test_without_a_bos_the_text_comes_first():
    tokenizer = tiny_tokenizer(bos=False)
    tokenizer.bos_token = None
    assert initial_ids(tokenizer, spec(), [5, 6]) == [5, 6, 5, 6]


def test_an_empty_text_to_start_from_is_refused():
    with pytest.raises(InvalidRequest, match="no tokens"):
        initial_ids(tiny_tokenizer(), spec(init_text=""), [5])
