from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest
import torch

from prefix_store import tensors
from prefix_store.jobs import TrainingSpec
from prefix_store.model import apply
from prefix_store.prefix import Method, PrefixManifest, Window
from tests.models import BOS, CONTEXT, tiny_frozen
from trainer.methods import METHODS
from trainer.methods.prompt_encoded import EncodedPrompt

P, MIDDLE = 5, 24
FROZEN = apply.attach(tiny_frozen("llama"))
NAMES = ["prompt_mlp", "prompt_lstm"]


def make(name: str, **options) -> EncodedPrompt:
    given = {"virtual_tokens": P, "bottleneck": MIDDLE, **options}
    method = METHODS[name](FROZEN, TrainingSpec("0" * 64, 1, method=name, **given), count(40))
    assert isinstance(method, EncodedPrompt)
    return method


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("virtual_tokens", [1, P])
def test_it_starts_as_the_embeddings_of_the_text(name, virtual_tokens):
    words = FROZEN.model.get_input_embeddings()(torch.tensor([BOS, *range(40, 40 + virtual_tokens - 1)]))
    made = make(name, virtual_tokens=virtual_tokens).embeds()
    assert (made - words).abs().max() < 1e-4 * words.abs().max()
    assert (made.flip(1) - words).abs().max() > 0.1 * words.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_gets_a_gradient_and_so_does_every_layer(name):
    method, ids = make(name), torch.arange(2, 14).reshape(2, 6)
    apply.logits(FROZEN, ids, torch.ones_like(ids), method.rows(2)).square().mean().backward()
    assert method.layers_without_gradient() == []
    assert all(parameter.grad.any() for parameter in method.parameters())


@pytest.mark.parametrize(("name", "all_others"), [("prompt_mlp", False), ("prompt_lstm", True)])
def test_whether_a_virtual_token_depends_on_the_others(name, all_others):
    encoder = make(name).encoder
    before = encoder.output().detach()
    encoder.embeddings.delta.data[2] += 1
    changed = (encoder.output() != before).any(dim=1).tolist()
    assert changed == [all_others or token == 2 for token in range(P)]


@pytest.mark.parametrize("name", NAMES)
def test_the_last_layer_reads_numbers_of_a_size_that_it_can_work_with(name):
    method = METHODS[name]

    def spread(drawn: Callable[[int, int], torch.nn.Module]) -> float:
        torch.manual_seed(0)
        with torch.no_grad():
            features = drawn(192, 512)(torch.randn(16, 192))
        return float((features - features.mean(0)).std())

    assert spread(method.drawn) > 0.2  # observed 1.02 and 0.26
    assert spread(method.body) < 0.15  # observed 0.11 and 0.01, as torch draws them


@pytest.mark.parametrize("name", NAMES)
def test_the_file_keeps_the_embeddings_and_no_encoder(name):
    method = make(name)
    for parameter in method.parameters():
        parameter.data += 0.1
    manifest, kept = method.manifest(), method.tensors()
    assert manifest == PrefixManifest(Method.PROMPT, FROZEN.geometry, P, P, FROZEN.digest, Window.SLIDES)
    tensors.validate(manifest, kept)
    tensors.check_fits(manifest, FROZEN.geometry, FROZEN.digest, CONTEXT)
    torch.testing.assert_close(kept["embeds"], method.embeds().detach(), atol=1e-6, rtol=0)
