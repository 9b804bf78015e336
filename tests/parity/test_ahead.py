"""Steps that are launched before the tokens of the one before are read give what steps one by one give."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from prefix_store.errors import PrefixNumerics
from prefix_store.model.frozen import FrozenModel
from server.engine import sampled as sampled_module
from server.engine.batch import Selection, Unread
from server.engine.engine import Engine
from server.engine.room import PATIENCE
from server.engine.sampled import Sampled
from server.scheduler.messages import FinishReason, GenerationRequest, TokenEvent
from server.scheduler.plan import Move, Row, StepPlan
from server.scheduler.sampling_params import SamplingParams
from tests.models import FAMILIES, random_kv, tiny_frozen, tiny_model
from tests.parity import test_step_graphs
from tests.parity.harness import (
    SAMPLE,
    TOLERANCE,
    alone,
    make_engine,
    payload,
    run_mixed,
    worst_difference,
)
from tests.parity.test_encoder_decoder import Family
from tests.parity.test_families import SCHEDULES, make_cases, payloads
from tests.server.engine.attention import listed


class Ahead:
    """An engine made to run ahead, as on a device that works by itself; `steps`: whether each was launched behind one.

    `short`: there is no memory for steps that are.
    """

    def __init__(self, engine: Engine, *, short: bool = False) -> None:
        self.steps: list[bool] = []
        engine.runs_ahead = True
        compute = engine.compute

        def noted(rows: Sequence[Row], unread: Unread | None = None) -> Sampled:
            self.steps.append(unread is not None)
            if unread is not None and short:
                raise MemoryError
            return compute(rows, unread)

        engine.compute = noted  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("family", "schedule"),
    [(name, "roomy") for name in FAMILIES] + [(name, other) for name in SAMPLE for other in ("chunked", "preempting")],
)
def test_mixed_rows_equal_the_request_alone(family: str, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served, plain = tiny_frozen(family), tiny_model(family)
    cases = [replace(case, new=2 * case.new) for case in make_cases(served)]
    if schedule == "preempting":
        monkeypatch.setattr("server.scheduler.admission.HEADROOM", 1)
    engine = make_engine(served, **SCHEDULES[schedule])
    ahead = Ahead(engine)
    tokens = run_mixed(engine, cases, payloads(cases))
    truth = [alone(plain, case) for case in cases]
    assert [tokens[str(index)] for index in range(len(cases))] == [found for found, _ in truth]
    assert worst_difference(engine, [logits for _, logits in truth]) < TOLERANCE
    assert sum(ahead.steps) > 3


def test_rows_that_outgrow_their_slots_in_a_step_behind_another_are_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.scheduler.admission.HEADROOM", 1)
    served, plain = tiny_frozen("llama"), tiny_model("llama")
    cases = [replace(case, new=20, arrives=0) for case in make_cases(served)]
    engine = make_engine(served)
    Ahead(engine)
    moved = []
    ahead = engine.scheduler.ahead

    def noted(plan: StepPlan) -> StepPlan | None:
        behind = ahead(plan)
        moved.extend(t for t in (behind.transfers if behind is not None else ()) if isinstance(t, Move))
        return behind

    monkeypatch.setattr(engine.scheduler, "ahead", noted)
    tokens = run_mixed(engine, cases, payloads(cases))
    assert [tokens[str(index)] for index in range(len(cases))] == [alone(plain, case)[0] for case in cases]
    assert len(moved) > 3


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_rows_with_sources_run_ahead_too(name: str) -> None:
    family = Family(name)
    engine = make_engine(family.served)
    ahead = Ahead(engine)
    tokens = run_mixed(engine, family.cases, family.payloads())
    assert [tokens[str(index)] for index in range(len(tokens))] == [ids for ids, _ in family.expected]
    assert any(ahead.steps)


def test_recorded_steps_are_fed_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    listed.pretend(monkeypatch, test_step_graphs.BUCKETS)
    served, plain = tiny_frozen("llama"), tiny_model("llama")
    cases = [replace(case, new=20) for case in make_cases(served)]
    engine = test_step_graphs.recorded_engine(served, slots=1000)
    ahead = Ahead(engine)
    tokens = run_mixed(engine, cases, payloads(cases))
    assert [tokens[str(index)] for index in range(len(cases))] == [alone(plain, case)[0] for case in cases]
    assert any(ahead.steps)


def test_a_row_that_goes_on_with_anothers_token_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    served = tiny_frozen("llama")
    cases = [replace(case, new=20) for case in make_cases(served)]
    engine, wrong = make_engine(served), make_engine(served)
    right = run_mixed(engine, cases, payloads(cases))

    def turned(tokens: torch.Tensor, selections: Sequence[Selection]) -> Unread:
        return Unread(tokens.flip(0), selections)

    monkeypatch.setattr(sampled_module, "Unread", turned)
    Ahead(wrong)
    assert run_mixed(wrong, cases, payloads(cases)) != right


def made(served: FrozenModel, seed: int) -> list[GenerationRequest]:
    """Requests of all kinds, over prefixes that some share."""
    draw, found = random.Random(seed), []
    for number in range(14):
        length = draw.choice([0, 0, 3, 8])
        prefix = payload(random_kv(served, length, seed=length), f"p{length}") if length else None
        new = draw.choice([1, 6, 15, 40])
        options = draw.choice([{}] * 8 + [{"frequency_penalty": 0.5}, {"logprobs": 2}, {"min_tokens": min(new, 5)}])
        params = SamplingParams(
            max_tokens=new,
            temperature=draw.choice([0.0, 1.0]),
            top_p=draw.choice([1.0, 0.8]),
            top_k=draw.choice([0, 20]),
            stop_token_ids=frozenset(draw.sample(range(120), draw.choice([0, 20]))),
            **options,
        )
        prompt = tuple(draw.randrange(3, 120) for _ in range(draw.choice([1, 4, 30])))
        found.append(GenerationRequest(f"{number}", draw.choice("ab"), prompt, params, prefix))
    return found


def outcome(engine: Engine, requests: list[GenerationRequest]) -> dict[str, tuple[list[int], FinishReason | None]]:
    """Tokens and reasons, of requests that come one a step."""
    tokens: dict[str, list[int]] = defaultdict(list)
    reasons: dict[str, FinishReason | None] = {}
    coming = list(enumerate(requests))
    while coming or len(reasons) < len(requests):
        if coming:
            seed, request = coming.pop(0)
            engine.scheduler.add(request, seed)
        for event in engine.step():
            tokens[event.request_id] += event.token_ids
            if event.finish_reason is not None:
                reasons[event.request_id] = event.finish_reason
        engine.scheduler.check_integrity()
    assert engine.scheduler.slots.used == sum(r.extent.size for r in engine.scheduler.residency.residents())
    return {name: (tokens[name], reason) for name, reason in reasons.items()}


@pytest.mark.parametrize("seed", range(8))
def test_whatever_ends_when_it_ends(seed: int) -> None:
    served = tiny_frozen("llama")
    requests = made(served, seed)
    sizes = {"slots": 150 if seed % 2 else 2000, "rows": 6, "step_tokens": 16}
    engine = make_engine(served, **sizes)
    ahead = Ahead(engine)
    found = outcome(engine, requests)
    assert found == outcome(make_engine(served, **sizes), requests)
    assert {reason for _, reason in found.values()} == {FinishReason.STOP, FinishReason.LENGTH}
    assert any(ahead.steps)


def test_a_step_that_there_is_no_memory_for_beside_another_is_run_after_it() -> None:
    served = tiny_frozen("llama")
    engine = make_engine(served)
    ahead = Ahead(engine, short=True)
    requests = made(served, 0)
    assert outcome(engine, requests) == outcome(make_engine(served), requests)
    assert engine.shortages == sum(ahead.steps)
    assert 0 < sum(ahead.steps) <= len(ahead.steps) // PATIENCE + 1, "tried again and again"


def test_a_row_that_overflows_fails_alone_though_the_next_step_goes_on_with_it() -> None:
    served = tiny_frozen("llama")
    cases = [replace(case, new=20, arrives=0) for case in make_cases(served)]
    prefixes = payloads(cases)
    right = run_mixed(make_engine(served), cases, prefixes)
    engine = make_engine(served)
    ahead = Ahead(engine)
    broken = payload(torch.full_like(cases[2].kv, torch.nan), "broken")
    events = spoilt(engine, GenerationRequest("broken", "default", (5, 6), SamplingParams(), broken), cases, prefixes)
    tokens: dict[str, list[int]] = defaultdict(list)
    for event in events:
        tokens[event.request_id] += event.token_ids
    assert tokens.pop("broken") == []
    assert tokens == right
    assert [e.request_id for e in events if isinstance(e.error, PrefixNumerics)] == ["broken"]
    assert any(ahead.steps)


def spoilt(engine: Engine, request: GenerationRequest, cases: list, prefixes: list) -> list[TokenEvent]:
    """All events of the cases with one more request among them."""
    engine.scheduler.add(request, 0)
    for index, case in enumerate(cases):
        params = SamplingParams(max_tokens=case.new, temperature=0.0, ignore_eos=True)
        engine.scheduler.add(GenerationRequest(f"{index}", "default", case.prompt, params, prefixes[index]), index)
    events = []
    while engine.scheduler.running or engine.scheduler.waiting:
        events += engine.step()
    return events
