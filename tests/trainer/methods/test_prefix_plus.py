from __future__ import annotations

from itertools import count

import pytest
import torch

from prefix_store import tensors
from prefix_store.errors import InvalidRequest
from prefix_store.jobs import TrainingSpec
from prefix_store.model import apply
from prefix_store.model.memory import FEATURE_MAPS
from prefix_store.prefix import Method, PrefixManifest
from tests.models import CONTEXT, FAMILIES, random_memory, tiny_frozen
from trainer.methods.prefix_plus import HeadMemory

IDS = torch.arange(2, 14).reshape(2, 6)


def make(family: str = "llama", start=None, **options) -> HeadMemory:
    frozen = apply.attach(tiny_frozen(family))
    spec = TrainingSpec("0" * 64, 1, method="prefix_plus", virtual_tokens=0, **options)
    return HeadMemory(frozen, spec, count(40) if start is None else start)


def logits(family: str, method: HeadMemory | None) -> torch.Tensor:
    frozen = apply.attach(tiny_frozen(family))
    return apply.logits(frozen, IDS, torch.ones_like(IDS), method.rows(2) if method is not None else None)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_as_exactly_the_bare_model(family, feature_map):
    method = make(family, feature_map=feature_map)
    assert torch.equal(logits(family, method), logits(family, None))
    method.parameters()[0].data += 0.1
    assert not torch.allclose(logits(family, method), logits(family, None), atol=1e-2)


def test_every_head_of_every_layer_gets_a_gradient_at_once():
    method = make()
    assert method.layers_without_gradient() == [0, 1, 2]
    logits("llama", method).square().mean().backward()
    assert method.layers_without_gradient() == []
    (delta,) = method.parameters()
    assert delta.grad.flatten(2).any(dim=2).all()
    delta.grad[1] = 0
    assert method.layers_without_gradient() == [1]


def test_a_delta_of_ones_adds_about_what_values_differ_by():
    method = make()
    (delta,) = method.parameters()
    delta.data.normal_(generator=torch.Generator().manual_seed(0))
    memory = method.tensors()["memory"]
    values = apply.prefill_kv(apply.attach(tiny_frozen("llama")), list(range(40, 60)))[:, 1]
    features = torch.ones(delta.shape[-1])
    added = torch.einsum("d,lhde->lhe", features, memory).std(dim=(1, 2))
    ratio = added / values.std(dim=(1, 2, 3))
    assert ((ratio > 0.5) & (ratio < 2)).all(), ratio


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_the_file_keeps_the_memory_and_its_phi(feature_map):
    method = make(feature_map=feature_map)
    method.parameters()[0].data += 0.1
    manifest, kept = method.manifest(), method.tensors()
    frozen = tiny_frozen("llama")
    assert manifest == PrefixManifest(Method.PREFIX_PLUS, frozen.geometry, 0, 0, frozen.digest, feature_map=feature_map)
    tensors.validate(manifest, kept)
    tensors.check_fits(manifest, frozen.geometry, frozen.digest, CONTEXT)
    method.parameters()[0].data += 0.1
    assert not torch.equal(kept["memory"], method.tensors()["memory"]), "what was taken does not move"


def test_it_may_start_as_another_memory_and_as_nothing_else():
    memory = random_memory(tiny_frozen("llama"))
    method = make(start={"memory": memory}, init_from="acme/x@1")
    assert torch.equal(method.tensors()["memory"], memory)
    with pytest.raises(InvalidRequest, match="starts from a prefix of 'memory', and"):
        make(start={"self.kv": torch.zeros(1)}, init_from="acme/x@1")
