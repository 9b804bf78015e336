"""A model is taken the fast way only where a probe shows that it gives what the plain reference gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, BloomConfig

from prefix_store.errors import ModelUnsupported
from prefix_store.geometry import ModelGeometry
from prefix_store.model import apply
from prefix_store.model.frozen import FrozenModel
from tests.models import CONTEXT, VOCABULARY, tiny_frozen, tiny_tokenizer
from trainer import frozen_linear, packed, training_model
from trainer.frozen_linear import FrozenLinear
from trainer.head import Head
from trainer.packed import Bucket
from trainer.training_model import TrainingModel

IDS = torch.tensor([[5, 6, 7, 8]])


def untouched(frozen: FrozenModel) -> bool:
    return not any(isinstance(module, FrozenLinear) for module in frozen.model.modules())


ATTEND, KERNEL = Bucket.attend, functional.scaled_dot_product_attention


def failing(*_: object) -> None:
    raise AttributeError("no such body")


BROKEN: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "masks": (Bucket, "_made_mask", lambda *_: None),
    "attention": (
        packed.functional,
        "scaled_dot_product_attention",
        lambda *inputs, scale, **options: KERNEL(*inputs, scale=1.1 * scale, **options),
    ),
    "gradients": (Bucket, "attend", lambda *inputs, **options: ATTEND(*inputs, **options).detach()),
    "logits": (Head, "__call__", lambda self, hidden: 1.01 * self._model.lm_head(hidden)),
    "no body to stand in for": (Head, "__call__", failing),
    "products": (frozen_linear, "_multiply", lambda x, weight, bias: functional.linear(x, 1.01 * weight, bias)),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_fast_way_that_would_be_wrong_is_not_taken(what, monkeypatch):
    expected = apply.logits(apply.attach(tiny_frozen("llama")), IDS, torch.ones_like(IDS), None)
    with monkeypatch.context() as patch:
        patch.setattr(*BROKEN[what])
        patch.setattr(frozen_linear, "works", lambda like: True)  # which would find out about products by itself
        frozen = training_model.attach(tiny_frozen("llama"))
    assert not isinstance(frozen, TrainingModel)
    assert untouched(frozen)
    assert torch.equal(apply.logits(frozen, IDS, torch.ones_like(IDS), None), expected)


def test_a_sound_model_is_taken_and_its_weights_are_the_same_ones():
    frozen = tiny_frozen("gpt2")
    weights = {name: value.data_ptr() for name, value in frozen.model.state_dict().items()}
    ready = training_model.attach(frozen)
    assert isinstance(ready, TrainingModel)
    assert {name: value.data_ptr() for name, value in ready.model.state_dict().items()} == weights
    assert (ready.digest, ready.geometry, ready.model) == (frozen.digest, frozen.geometry, frozen.model)
    assert training_model.attach(ready) is ready


def test_what_no_prefix_reaches_is_refused_as_before():
    config = BloomConfig(n_layer=2, hidden_size=32, n_head=4, vocab_size=VOCABULARY, pad_token_id=None)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    frozen = FrozenModel(model, tiny_tokenizer(), ModelGeometry("bloom", 2, 4, 2, 8, 32), "0" * 64, "strange", CONTEXT)
    with pytest.raises(ModelUnsupported, match="attention"):
        training_model.attach(frozen)


def test_soft_prompts_and_text_still_become_keys_and_values():
    plain, ready = apply.attach(tiny_frozen("llama")), training_model.attach(tiny_frozen("llama"))
    embeds = torch.randn(3, 48, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = []
    for frozen in (plain, ready):
        kv = apply.prefill_embeds(frozen, embeds)
        found.append(
            [apply.prefill_kv(frozen, [5, 6, 7]), kv.detach(), *torch.autograd.grad(kv.square().sum(), embeds)]
        )
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
