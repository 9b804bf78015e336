from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from functools import cache
from itertools import chain, count
from pathlib import Path

import pytest
import torch

from prefix_store import tensors
from prefix_store.jobs import BUILT_IN_METHODS, DEFAULTS, TrainingSpec
from prefix_store.model import apply
from prefix_store.model.frozen import BUNDLED, FrozenModel, load
from tests.judging import nats_per_token
from tests.models import tiny_frozen
from trainer import data, training_model
from trainer.data import Example
from trainer.loop import fit
from trainer.methods import METHODS

FORECASTS = Path(__file__).parents[2] / "docs" / "examples" / "forecast.jsonl"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_a_prefix_that_learns_and_that_the_store_takes(name):
    frozen = apply.attach(tiny_frozen("llama"))
    length = 0 if name == "prefix_plus" else 3
    method = METHODS[name](frozen, TrainingSpec("0" * 64, 1, method=name, virtual_tokens=length), count(2))
    ids = torch.arange(2, 8)[None]
    apply.logits(frozen, ids, torch.ones_like(ids), method.rows(1)).square().mean().backward()
    assert method.layers_without_gradient() == []
    assert all(parameter.grad.any() for parameter in method.parameters())
    tensors.validate(method.manifest(), method.tensors())


@cache
def forecasts() -> tuple[FrozenModel, tuple[list[Example], list[Example]]]:
    frozen = training_model.attach(load(BUNDLED))
    rows = [json.loads(line) for line in FORECASTS.read_text("utf-8").splitlines()]
    return frozen, data.split(data.tokenize(frozen.tokenizer, rows, 64), seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_a_real_task_at_its_defaults(name):
    frozen, (train, valid) = forecasts()
    steps = {"prefix_mlp": 60, "prompt_lstm": 35, "prompt_mlp": 28}.get(name, 20)  # the first steps of these lead away
    spec = TrainingSpec("0" * 64, len(train), **{"method": name, "steps": steps, **DEFAULTS.get(name, {})})
    method = METHODS[name](frozen, spec, chain.from_iterable(example.ids for example in train))

    def held_out() -> float:
        return nats_per_token(frozen, method.rows, [valid])

    start, bare = held_out(), nats_per_token(frozen, None, [valid])
    fit(frozen, method, train, dataclasses.replace(spec, learning_rate=1e-7, steps=4))
    assert held_out() == pytest.approx(start, abs=0.01), "what lowers the loss is what is learnt"
    fit(frozen, method, train, spec)
    assert held_out() < min(start, bare) - 1


def test_what_may_be_submitted_is_what_can_be_trained():
    assert tuple(METHODS) == BUILT_IN_METHODS


def test_training_needs_no_web_and_no_settings_library():
    absent = ("pydantic", "pydantic_settings", "fastapi", "uvicorn", "redis", "structlog")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import trainer.worker"
    subprocess.run([sys.executable, "-c", code], check=True)
