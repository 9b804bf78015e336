"""A row of a mixed batch is the same request alone in transformers, for every family served."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prefix_store.model import frozen
from prefix_store.model.frozen import FrozenModel
from server.scheduler.messages import PrefixPayload
from tests.models import FAMILIES, VOCABULARY, random_kv, tiny_frozen, tiny_model
from tests.parity.harness import (
    TOLERANCE,
    Case,
    alone,
    backends,
    make_engine,
    payload,
    plain_logits,
    recorded,
    request,
    run_mixed,
    sampled,
    worst_difference,
)

STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260K"
Family = tuple[str, FrozenModel, list[Case], list[tuple[list[int], torch.Tensor]]]
LENGTHS = [None, 1, 5, 20, 53, None, 5, 20, 2]


def make_cases(model: FrozenModel, vocabulary: int = VOCABULARY, seed: int = 0) -> list[Case]:
    """Nine requests over seven prefixes, two of them shared, arriving over a dozen steps."""
    draw = random.Random(seed)
    cases = []
    for index, length in enumerate(LENGTHS):
        kv = random_kv(model, length, seed=length) if length else None
        prompt = tuple(draw.randrange(3, vocabulary) for _ in range(draw.choice([1, 3, 9, 23])))
        cases.append(Case(prompt, kv, new=draw.choice([3, 6, 12]), arrives=draw.randrange(0, 12), name=f"{index}"))
    return cases


def payloads(cases: list[Case]) -> list[PrefixPayload | None]:
    return [payload(case.kv, f"length {case.kv.shape[3]}") if case.kv is not None else None for case in cases]


@pytest.fixture(scope="module", name="family", params=sampled([*FAMILIES, "stories260K"]))
def each_family(request: pytest.FixtureRequest) -> Family:
    """The family's name, a model to serve, cases, and what plain transformers says of each."""
    if request.param == "stories260K":
        if not STORIES.is_dir():
            pytest.skip("the trained stories260K model is not at hand (shared/models)")
        served, plain = frozen.load(STORIES), frozen.load(STORIES).model
        cases = make_cases(served, 512)
        # Real keys and values, as a trained prefix would have: those of a text.
        cases = [c if c.kv is None else replace(c, kv=text_kv(plain, c.kv.shape[3])) for c in cases]
    else:
        served, plain = tiny_frozen(request.param), tiny_model(request.param)
        cases = make_cases(served)
    return request.param, served, cases, [alone(plain, case) for case in cases]


@torch.inference_mode()
def text_kv(model: torch.nn.Module, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, 512, (1, length), generator=generator)
    cache = model(ids, use_cache=True).past_key_values
    return torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])


SCHEDULES = {
    "roomy": {},
    "chunked": {"step_tokens": 5, "rows": 4},
    "preempting": {"slots": 110, "rows": 9, "step_tokens": 16},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("backend", backends())
def test_mixed_rows_equal_the_request_alone(family, schedule, backend, record_worst, monkeypatch):
    name, served, cases, expected = family
    if schedule == "preempting":
        # without headroom every answer outgrows its extent, so rows are moved and preempted all the time
        monkeypatch.setattr("server.scheduler.admission.HEADROOM", 1)
    engine = make_engine(served, backend, **SCHEDULES[schedule])
    tokens = run_mixed(engine, cases, payloads(cases))
    assert [tokens[str(i)] for i in range(len(cases))] == [tokens_alone for tokens_alone, _ in expected]
    worst = worst_difference(engine, [logits for _, logits in expected])
    record_worst(name, worst)
    assert worst < TOLERANCE
    assert (engine.scheduler.admission.preemptions > 0) == (schedule == "preempting")


def test_swapped_prefixes_fail_the_check(family):
    _, served, cases, expected = family
    swapped = payloads(cases)
    swapped[2], swapped[3] = swapped[3], swapped[2]
    assert difference(served, cases, swapped, expected) > 100 * TOLERANCE


def test_a_position_off_by_one_fails_the_check(family):
    _, served, cases, expected = family
    shifted = [replace(p, position_offset=p.position_offset + 1) if p else None for p in payloads(cases)]
    assert difference(served, cases, shifted, expected) > 100 * TOLERANCE


def test_an_unmasked_pad_fails_the_check(family):
    _, served, cases, expected = family
    padded = [
        replace(p, virtual_tokens=p.virtual_tokens + 1, tensor=torch.nn.functional.pad(p.tensor, (0, 0, 0, 1)))
        if p
        else None
        for p in payloads(cases)
    ]
    assert difference(served, cases, padded, expected) > 100 * TOLERANCE


def test_neighbours_full_of_nan_change_nothing(family):
    _, served, cases, expected = family
    poisoned = payloads(cases)
    for index, p in enumerate(poisoned):
        if p is not None and p.digest != "length 20":
            poisoned[index] = replace(p, tensor=torch.full_like(p.tensor, torch.nan))
    engine = make_engine(served)
    engine.pool.keys.fill_(torch.nan)
    engine.pool.values.fill_(torch.nan)
    clean = [i for i, p in enumerate(poisoned) if p is None or p.digest == "length 20"]
    for index, case in enumerate(cases):
        engine.scheduler.add(request(str(index), case, poisoned[index]), seed=0)
    while engine.scheduler.running or engine.scheduler.waiting:
        engine.step()
    for index in clean:
        got = recorded(engine, str(index))
        assert float((got - expected[index][1]).abs().max()) < TOLERANCE


def difference(served, cases, prefixes, expected) -> float:
    engine = make_engine(served)
    run_mixed(engine, cases, prefixes)
    return worst_difference(engine, [logits for _, logits in expected])


def test_a_window_that_always_shows_the_prefix_differs_from_one_that_slides():
    """On a sliding-window model the two meanings part as soon as a row outgrows the window."""
    served, plain = tiny_frozen("mistral"), tiny_model("mistral")
    kv = random_kv(served, 4)
    case = Case(tuple(range(3, 23)), kv, new=1)
    slides, always = make_engine(served), make_engine(served)
    run_mixed(slides, [case], [payload(kv, "slides", slides=True)])
    run_mixed(always, [case], [payload(kv, "always", slides=False)])
    reference = plain_logits(plain, case.prompt, kv)[-1]
    assert float((recorded(slides, "0")[0] - reference).abs().max()) < TOLERANCE
    assert float((recorded(always, "0")[0] - reference).abs().max()) > 100 * TOLERANCE
