from __future__ import annotations

import subprocess
import sys
from itertools import count

import pytest
import torch

from prefix_store import tensors
from prefix_store.jobs import BUILT_IN_METHODS, TrainingSpec
from prefix_store.model import apply
from tests.models import tiny_frozen
from trainer.methods import METHODS


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_a_prefix_that_learns_and_that_the_store_takes(name):
    frozen = apply.attach(tiny_frozen("llama"))
    method = METHODS[name](frozen, TrainingSpec("0" * 64, 1, method=name, virtual_tokens=3), count(2))
    ids = torch.arange(2, 8)[None]
    apply.logits(frozen, ids, torch.ones_like(ids), method.rows(1)).square().mean().backward()
    assert method.layers_without_gradient() == []
    assert all(parameter.grad.any() for parameter in method.parameters())
    tensors.validate(method.manifest(), method.tensors())


def test_what_may_be_submitted_is_what_can_be_trained():
    assert tuple(METHODS) == BUILT_IN_METHODS


def test_training_needs_no_web_and_no_settings_library():
    absent = ("pydantic", "pydantic_settings", "fastapi", "uvicorn", "redis", "structlog")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import trainer.evaluate, trainer.worker"
    subprocess.run([sys.executable, "-c", code], check=True)
