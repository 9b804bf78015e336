from __future__ import annotations

import torch

from prefix_store import tensors
from prefix_store.jobs import TrainingSpec
from prefix_store.prefix import Method, PrefixManifest, Window
from tests.models import CONTEXT, random_kv, tiny_frozen
from trainer.methods.base import KVMethod

FROZEN = tiny_frozen("llama")
P = 4


class Gain(KVMethod):
    """Random keys and values, made louder or softer by a number for each layer."""

    def __init__(self) -> None:
        super().__init__(FROZEN, TrainingSpec("0" * 64, 1, virtual_tokens=P))
        self.start = random_kv(FROZEN, P)
        self.gain = torch.nn.Parameter(torch.ones(3, 1, 1, 1, 1))

    def parameters(self) -> list[torch.nn.Parameter]:
        return [self.gain]

    def kv(self) -> torch.Tensor:
        return self.gain * self.start


def test_every_row_is_the_prefix_and_real_tokens_come_after_it():
    rows = Gain().rows(3)
    assert torch.equal(rows.kv, random_kv(FROZEN, P).expand(3, -1, -1, -1, -1, -1))
    assert rows.offset.tolist() == [P] * 3
    assert not rows.slides.any()


def test_layers_that_no_gradient_reaches_are_named():
    method = Gain()
    assert method.layers_without_gradient() == [0, 1, 2], "before any backward"
    method.rows(2).kv[:, [0, 2]].sum().backward()
    assert method.layers_without_gradient() == [1]
    with torch.no_grad():
        method.rows(2)
    assert method.layers_without_gradient() == [1], "validating in between tells nothing of training"
    method.rows(2).kv.sum().backward()
    assert method.layers_without_gradient() == []


def test_the_finished_prefix_is_a_sound_one_for_this_model():
    method = Gain()
    manifest, kept = method.manifest(), method.tensors()
    assert manifest == PrefixManifest(Method.PREFIX, FROZEN.geometry, P, P, FROZEN.digest, Window.ALWAYS)
    tensors.validate(manifest, kept)
    tensors.check_fits(manifest, FROZEN.geometry, FROZEN.digest, CONTEXT)
    assert not kept["self.kv"].requires_grad
    method.gain.data *= 2
    assert torch.equal(kept["self.kv"], method.start), "what was taken does not move with the training"
    assert torch.equal(method.tensors()["self.kv"], 2 * method.start)
