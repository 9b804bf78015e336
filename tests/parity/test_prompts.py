"""A row with a soft prompt is the plain model with that prompt's embeddings in front, whatever its neighbours use."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from server.scheduler.messages import PrefixPayload
from tests.models import FAMILIES, VOCABULARY, random_kv, tiny_frozen, tiny_model
from tests.parity.harness import (
    TOLERANCE,
    Case,
    alone,
    backends,
    make_engine,
    payload,
    run_mixed,
    sampled,
    worst_difference,
)

LENGTHS = [1, 5, 20]


def soft_prompt(model: torch.nn.Module, length: int) -> torch.Tensor:
    """Embeddings `[P, E]` on the scale of the model's own, though of no token."""
    table = model.get_input_embeddings()(torch.arange(VOCABULARY)).detach()
    generator = torch.Generator().manual_seed(length)
    return table.std() * torch.randn(length, table.shape[1], generator=generator)


@torch.inference_mode()
def prompt_alone(model: torch.nn.Module, case: Case, prompt: torch.Tensor) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and their logits `[new, V]`, the whole row recomputed from embeddings for every token."""
    ids, rows = list(case.prompt), []
    for _ in range(case.new):
        own = model.get_input_embeddings()(torch.tensor([ids]))
        rows.append(model(inputs_embeds=torch.cat([prompt[None], own], dim=1), use_cache=False).logits[0, -1])
        ids.append(int(rows[-1].argmax()))
    return ids[len(case.prompt) :], torch.stack(rows)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("family", sampled(FAMILIES))
def test_mixed_rows_equal_the_embeddings_in_front(family, backend, record_worst):
    draw = random.Random(0)
    served, plain = tiny_frozen(family), tiny_model(family)
    cases, prefixes, expected = [], [], []
    for index in range(8):
        prompt = tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.choice([1, 4, 17])))
        case = Case(prompt, None, new=6, arrives=index)
        if index % 4 == 3:  # neighbours of the other kind
            case = replace(case, kv=random_kv(served, 5, seed=5))
            prefixes.append(payload(case.kv, "kv"))
            expected.append(alone(plain, case))
        else:
            length = LENGTHS[index % 3]
            embeds = soft_prompt(plain, length)
            prefixes.append(PrefixPayload(f"prompt {length}", length, length, True, embeds, is_embeds=True))
            expected.append(prompt_alone(plain, case, embeds))
        cases.append(case)
    logits = [row for _, row in expected]
    # too small a pool for all four prefixes: some are evicted and made again
    engine = make_engine(served, backend, step_tokens=9, rows=3, slots=44)
    tokens = run_mixed(engine, cases, prefixes)
    assert engine.scheduler.residency.evictions > 0
    worst = worst_difference(engine, logits)
    record_worst(f"{family}, soft prompts", worst)
    assert worst < TOLERANCE
    assert [tokens[str(index)] for index in range(len(cases))] == [alone for alone, _ in expected]

    swapped = make_engine(served, backend)
    run_mixed(swapped, cases, prefixes[1:] + prefixes[:1])
    assert worst_difference(swapped, logits) > 100 * TOLERANCE
