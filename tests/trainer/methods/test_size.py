"""What is counted beforehand against what is there once it is made."""

from __future__ import annotations

from itertools import count

import pytest

from prefix_store.jobs import TrainingSpec
from prefix_store.model import apply
from tests.models import tiny_frozen
from trainer.methods import METHODS, size


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma", "bart"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("options", [{}, {"virtual_tokens": 3, "bottleneck": 7, "frozen_tokens": 5}])
def test_every_method_is_as_large_as_it_is_said_to_be(family, name, options):
    if (family, name) == ("bart", "prefix_plus"):
        pytest.skip("not for encoder-decoder models")
    frozen = apply.attach(tiny_frozen(family))
    given = {"virtual_tokens": 5, "bottleneck": 9, **options} | ({"virtual_tokens": 0} if name == "prefix_plus" else {})
    spec = TrainingSpec("0" * 64, 1, method=name, **given)
    made = METHODS[name](frozen, spec, count(2))
    assert size.tuned(frozen, spec, count(2)) == sum(parameter.numel() for parameter in made.parameters())


@pytest.mark.parametrize("stacks", [None, ("cross",), ("self", "encoder")])
def test_a_prefix_of_some_stacks_is_as_large_as_these(stacks):
    frozen = apply.attach(tiny_frozen("bart"))
    start = METHODS["prefix"](frozen, TrainingSpec("0" * 64, 1, stacks=stacks or ("cross",)), count(2)).tensors()
    spec = TrainingSpec("0" * 64, 1, method="prefix_mlp", stacks=stacks)
    made = METHODS["prefix_mlp"](frozen, spec, start)
    assert size.tuned(frozen, spec, start) == sum(parameter.numel() for parameter in made.parameters())


def test_what_could_not_be_made_can_be_counted():
    spec = TrainingSpec("0" * 64, 1, method="prompt_lstm", bottleneck=8192)
    found = size.tuned(tiny_frozen("llama"), spec, ())
    assert found is not None
    assert found > 2e9


def test_nobody_knows_of_others():
    assert size.tuned(tiny_frozen("llama"), TrainingSpec("0" * 64, 1, method="plugged"), ()) is None
