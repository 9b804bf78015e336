"""What training saw is what is served: a prefix of each method, trained, stored and read, among the others."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from prefix_store import codec
from prefix_store.jobs import TrainingSpec
from prefix_store.model import apply
from server.engine.prefix_loader import payload_of
from server.scheduler.messages import PrefixPayload
from tests.models import tiny_frozen
from tests.parity.harness import TOLERANCE, Case, make_engine, run_mixed, sampled, worst_difference
from trainer import forward
from trainer.data import Example
from trainer.forward import Group
from trainer.loop import fit
from trainer.methods import METHODS
from trainer.methods.base import TuningMethod

FAMILIES = ["gpt2", "llama", "mistral", "gemma2", "qwen3"]
EXAMPLES = [Example(tuple(range(first, first + 9)), 3) for first in (2, 30, 60, 90)]
PROMPTS = [(5, 6, 7), (40,), tuple(range(100, 117))]


@cache
def trained(family: str, name: str) -> TuningMethod:
    spec = TrainingSpec(
        "0" * 64,
        len(EXAMPLES),
        method=name,
        virtual_tokens=0 if name == "prefix_plus" else 6,
        steps=3,
        batch_size=4,
        bottleneck=24,
    )
    frozen = apply.attach(tiny_frozen(family))
    method = METHODS[name](frozen, spec, range(40, 60))
    fit(frozen, method, EXAMPLES, spec)
    return method


@torch.no_grad()
def seen_in_training(family: str, method: TuningMethod, prompt: tuple[int, ...], tokens: list[int]) -> torch.Tensor:
    """The logits `[new, V]` that training's own forward gives for what was generated."""
    frozen = apply.attach(tiny_frozen(family))
    (logits,) = forward.logits(frozen, [Group(method.rows(1), [Example((*prompt, *tokens), len(prompt))])])
    return logits


@pytest.mark.parametrize("family", sampled(FAMILIES))
def test_rows_of_every_method_give_the_logits_of_training(family, tmp_path, record_worst):
    cases: list[Case] = []
    prefixes: list[PrefixPayload | None] = []
    names = list(METHODS)
    for name in names:
        method, path = trained(family, name), tmp_path / name
        codec.write(method.manifest(), method.tensors(), path)
        payload = payload_of(codec.digest_of(path), *codec.decode(path), torch.float32)
        for prompt in PROMPTS:
            cases.append(Case(prompt, None, new=3, arrives=len(cases)))
            prefixes.append(payload)
    engine = make_engine(tiny_frozen(family), step_tokens=9, rows=5)
    tokens = run_mixed(engine, cases, prefixes)
    expected = [
        seen_in_training(family, trained(family, names[index // len(PROMPTS)]), case.prompt, tokens[str(index)])
        for index, case in enumerate(cases)
    ]
    worst = worst_difference(engine, expected)
    record_worst(f"{family}, trained", worst)
    assert worst < TOLERANCE
    assert all(row.argmax(1).tolist() == tokens[str(index)] for index, row in enumerate(expected))

    swapped = make_engine(tiny_frozen(family))
    run_mixed(swapped, cases, prefixes[len(PROMPTS) :] + prefixes[: len(PROMPTS)])
    assert worst_difference(swapped, expected) > 100 * TOLERANCE
