"""Where memory runs out, rows that can be computed are what they are alone, and only what cannot be gets an error."""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from prefix_store.errors import OutOfMemory
from prefix_store.model import shortage
from server.engine import sampler
from server.engine.batch import Batch, Selection
from server.engine.engine import Engine
from server.engine.launched import Launched
from server.engine.room import PATIENCE
from server.engine.sampled import Sampled
from server.scheduler.messages import FinishReason, GenerationRequest, PrefixPayload, TokenEvent
from server.scheduler.plan import StepPlan
from server.scheduler.sampling_params import SamplingParams
from tests.models import VOCABULARY, random_kv, tiny_frozen, tiny_model
from tests.parity.harness import TOLERANCE, Case, make_engine, payload, recorded, request, run_mixed, worst_difference
from tests.parity.test_encoder_decoder import TOLERANCE as RELATIVE_TOLERANCE
from tests.parity.test_encoder_decoder import Family as Stacked
from tests.parity.test_families import alone, make_cases, payloads
from tests.parity.test_prompts import prompt_alone, soft_prompt

STEP_TOKENS = 64
Check = Callable[[Batch], bool]


def out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


class Short:
    """Has forwards fail as a device without memory does, where `is_too_much` of their batch; counts all attempts.

    Half of the layers have written into the pool by then, and what they made is gone before the next attempt.
    """

    def __init__(self, engine: Engine, is_too_much: Check) -> None:
        self.is_too_much = is_too_much
        self.attempts = self.failures = 0
        self._pool, self._run = engine.pool, engine.runner.run
        self._left: list[weakref.ref[torch.Tensor]] = []
        engine.runner.run = self.run  # type: ignore[method-assign]

    def run(self, batch: Batch) -> torch.Tensor:
        self.attempts += 1
        assert not any(made() is not None for made in self._left), "the memory of a failed attempt is still taken"
        if self.is_too_much(batch):
            self.failures += 1
            layers = len(self._pool.keys) // 2
            self._pool.keys[:layers, batch.slots] = torch.nan
            made = torch.zeros(8)
            self._left.append(weakref.ref(made))
            raise out_of_memory()
        return self._run(batch)


def tokens_of(batch: Batch) -> int:
    return len(batch.slots)


@pytest.fixture(autouse=True)
def in_order(monkeypatch):
    """What is carried out of a plan is in its order, and only readers of what is lost are left out."""
    launch = Engine.launch

    def checked(engine: Engine, plan: StepPlan) -> Launched:
        done = launch(engine, plan)
        planned = [row for row in plan.rows if not any(load.is_read_by(row.sequence) for load in done.lost)]
        assert [(row.sequence, row.start) for row in done.plan.rows] == [(row.sequence, row.start) for row in planned]
        assert all(0 < row.count <= whole.count for row, whole in zip(done.plan.rows, planned, strict=True))
        return done

    monkeypatch.setattr(Engine, "launch", checked)


@pytest.fixture(scope="module")
def family():
    served, plain = tiny_frozen("llama"), tiny_model("llama")
    cases = make_cases(served)
    return served, cases, [alone(plain, case) for case in cases]


def is_right(found: dict[str, list[int]], expected, names: Sequence[int]) -> bool:
    return [found[str(index)] for index in names] == [expected[index][0] for index in names]


def finish(engine: Engine, found: dict[str, list[int]] | None = None) -> dict[str, TokenEvent]:
    """Runs until nothing is in flight; the last event of each request."""
    last = {}
    for _ in range(1000):
        if not engine.scheduler.running and not engine.scheduler.waiting:
            return last
        for event in engine.step():
            if found is not None:
                found[event.request_id].extend(event.token_ids)
            if event.finish_reason is not None:
                last[event.request_id] = event
        engine.scheduler.check_integrity()
    raise AssertionError("the engine does not finish")


@pytest.mark.parametrize("most", [20, 9, 2, 1])
def test_rows_are_what_they_are_alone_however_few_tokens_there_is_memory_for(family, most):
    served, cases, expected = family
    engine = make_engine(served, step_tokens=STEP_TOKENS)
    short = Short(engine, lambda batch: tokens_of(batch) > most)
    tokens = run_mixed(engine, cases, payloads(cases))
    assert is_right(tokens, expected, range(len(cases)))
    assert worst_difference(engine, [logits for _, logits in expected]) < TOLERANCE
    assert engine.shortages == short.failures > 0
    assert engine.scheduler.admission.preemptions == 0, "taking slots from a row would give nothing back"
    # it falls to a size that fits by halves, and tries twice that once so many pieces ran
    assert short.failures <= math.log2(STEP_TOKENS) + short.attempts / PATIENCE


@pytest.mark.parametrize("name", ["bart", pytest.param("t5", marks=pytest.mark.slow)])
def test_rows_with_sources_are_what_they_are_alone(name):
    family = Stacked(name)
    engine = make_engine(family.served)
    short = Short(engine, lambda batch: tokens_of(batch) > 1)
    tokens = run_mixed(engine, family.cases, family.payloads())
    assert [tokens[str(index)] for index in range(len(family.cases))] == [ids for ids, _ in family.expected]
    assert family.worst(engine) < RELATIVE_TOLERANCE
    assert short.failures > 0


@pytest.mark.parametrize("times", [1, 2, 5])
def test_a_shortage_that_passes_costs_nobody_anything(family, times):
    """Again and again a step fails so many times, whatever its size, unless it is as small as can be."""
    served, cases, expected = family
    engine = make_engine(served)
    left = [0]

    def is_too_much(batch: Batch) -> bool:
        left[0] = (left[0] or times + 7) - 1
        return left[0] >= 7 and tokens_of(batch) > 1

    Short(engine, is_too_much)
    assert is_right(run_mixed(engine, cases, payloads(cases)), expected, range(len(cases)))
    assert engine.shortages > times


def test_without_the_handling_rows_are_lost(family, monkeypatch):
    served, cases, _ = family
    monkeypatch.setattr(shortage, "ran_out", lambda error: False)
    engine = make_engine(served)
    Short(engine, lambda batch: tokens_of(batch) > 9)
    with pytest.raises(torch.OutOfMemoryError):
        run_mixed(engine, cases, payloads(cases))
    assert {event.finish_reason for event in engine.scheduler.fail_running("as the loop does")} == {FinishReason.ERROR}


def test_nobody_else_is_touched_by_a_row_that_does_not_fit_alone(family):
    served, cases, expected = family
    engine = make_engine(served, step_tokens=STEP_TOKENS)
    for index, (case, prefix) in enumerate(zip(cases, payloads(cases), strict=True)):
        engine.scheduler.add(request(str(index), case, prefix), seed=index)
    short = Short(engine, lambda batch: any(s.row.sequence.request.id == "3" for s in batch.selections))
    found: dict[str, list[int]] = defaultdict(list)
    last = finish(engine, found)
    assert isinstance(last["3"].error, OutOfMemory)
    assert last["3"].finish_reason is FinishReason.ERROR
    others = [index for index in range(len(cases)) if index != 3]
    assert is_right(found, expected, others)
    assert {last[str(index)].finish_reason for index in others} == {FinishReason.LENGTH}
    assert short.failures <= 2 * math.log2(STEP_TOKENS)


def test_if_nothing_fits_everybody_is_told_soon_and_the_next_ones_are_right(family):
    served, cases, expected = family
    engine = make_engine(served, step_tokens=STEP_TOKENS)
    for index, (case, prefix) in enumerate(zip(cases, payloads(cases), strict=True)):
        engine.scheduler.add(request(str(index), case, prefix), seed=index)
    short = Short(engine, lambda batch: True)
    last = finish(engine)
    assert {type(event.error) for event in last.values()} == {OutOfMemory}
    assert short.attempts <= len(cases) + 2 * math.log2(STEP_TOKENS)
    short.is_too_much = lambda batch: False
    engine.runner.run = short._run  # the first ones recorded nothing
    again = run_mixed(engine, [replace(case, arrives=0) for case in cases], payloads(cases))
    assert is_right(again, expected, range(len(cases)))
    assert worst_difference(engine, [logits for _, logits in expected]) < TOLERANCE


def options(index: int) -> SamplingParams:
    """Beams, draws, penalties, and prompts that are scored."""
    kinds = [
        {"num_beams": 3},
        {"temperature": 1.0, "top_p": 0.9, "seed": index},
        {"temperature": 0.0, "echo": True, "logprobs": 4},
        {"temperature": 0.7, "repetition_penalty": 1.3, "top_k": 40, "seed": index},
    ]
    return SamplingParams(max_tokens=10, ignore_eos=True, **kinds[index % len(kinds)])


def everything(engine: Engine, cases: Sequence[Case]) -> list[tuple]:
    """What requests of all kinds are answered: tokens, answers of beams, and scores of the prompt, rounded."""
    for index, (case, prefix) in enumerate(zip(cases, payloads(list(cases)), strict=True)):
        made = GenerationRequest(str(index), "default", case.prompt, options(index), prefix)
        engine.scheduler.add(made, seed=index)
    tokens: dict[str, list[int]] = defaultdict(list)
    scores: dict[str, list[float | None]] = {}
    last: dict[str, TokenEvent] = {}
    while engine.scheduler.running or engine.scheduler.waiting:
        for event in engine.step():
            tokens[event.request_id].extend(event.token_ids)
            last[event.request_id] = event
            if event.prompt_logprobs is not None:
                scored = [(entry.token_id, entry.logprob) for entry in event.prompt_logprobs]
                scores[event.request_id] = [(token, round(value or 0.0, 3)) for token, value in scored]
        engine.scheduler.check_integrity()
    return [
        (name, tokens[name], scores.get(name), [found.token_ids for found in last[name].hypotheses])
        for name in sorted(last)
    ]


@pytest.mark.parametrize("most", [12, 4, 1])
def test_beams_draws_and_scored_prompts_are_the_same_in_pieces(family, monkeypatch, most):
    """Here it is the sampler that has no memory, with the pool written already."""
    served, cases, _ = family
    whole = everything(make_engine(served), cases)
    engine = make_engine(served)

    def sample(logits: torch.Tensor, selections: Sequence[Selection]) -> Sampled:
        sampled = sampler.sample(logits, selections)
        if len(logits) > most:
            torch.empty(2**62, dtype=torch.uint8)  # as it is on a CPU
        return sampled

    monkeypatch.setattr("server.engine.engine.sample", sample)
    assert everything(engine, cases) == whole
    assert engine.shortages > 0
    assert {len(answers) for *_, answers in whole} == {0, 3}


@pytest.mark.parametrize("times", [1, 2])
def test_a_prefix_that_cannot_be_brought_costs_its_own_requests_and_is_never_served(family, monkeypatch, times):
    """Brought half, `times` in a row: one failure is nothing, two are the end of whoever reads it."""
    served, cases, expected = family
    engine = make_engine(served)
    failing = payloads(cases)[2].digest
    apply, left = engine.pool.apply, [times]

    def short(transfer) -> None:
        if transfer.payload.digest == failing and left[0]:
            left[0] -= 1
            engine.pool.keys[:, transfer.extent.start : transfer.extent.end] = torch.nan
            raise out_of_memory()
        apply(transfer)

    monkeypatch.setattr(engine.pool, "apply", short)
    found: dict[str, list[int]] = defaultdict(list)
    for index, (case, prefix) in enumerate(zip(cases, payloads(cases), strict=True)):
        engine.scheduler.add(request(str(index), case, prefix), seed=index)
    last = finish(engine, found)
    readers = [index for index, prefix in enumerate(payloads(cases)) if prefix is not None and prefix.digest == failing]
    assert len(readers) == 2
    lost = readers if times == 2 else []
    assert [isinstance(last[str(index)].error, OutOfMemory) for index in range(len(cases))] == [
        index in lost for index in range(len(cases))
    ]
    assert is_right(found, expected, [index for index in range(len(cases)) if index not in lost])
    assert engine.shortages == times
    again = run_mixed(engine, [replace(cases[2], arrives=0)], [payloads(cases)[2]])
    assert again["0"] == expected[2][0]


def test_a_soft_prompt_that_cannot_be_computed_costs_its_own_requests_alone(monkeypatch):
    served, plain = tiny_frozen("llama"), tiny_model("llama")
    prompt, kv = soft_prompt(plain, 5), random_kv(served, 5, seed=5)
    soft = PrefixPayload("soft", 5, 5, True, prompt, is_embeds=True)
    cases = [Case((5, 6, 7), None, 6), Case((9, 8), kv, 6)]
    engine = make_engine(served)
    prefill, left = engine.runner.prefill, [2]

    def short(embeds: torch.Tensor, extent) -> None:
        prefill(embeds, extent)
        if left[0]:
            left[0] -= 1
            engine.pool.values[:, extent.start : extent.end] = torch.nan
            raise out_of_memory()

    monkeypatch.setattr(engine.runner, "prefill", short)
    engine.scheduler.add(request("soft", cases[0], soft), seed=0)
    engine.scheduler.add(request("kv", cases[1], payload(kv, "kv")), seed=0)
    found: dict[str, list[int]] = defaultdict(list)
    last = finish(engine, found)
    assert isinstance(last["soft"].error, OutOfMemory)
    assert found["kv"] == alone(plain, cases[1])[0]
    assert run_mixed(engine, cases[:1], [soft])["0"] == prompt_alone(plain, cases[0], prompt)[0]


def test_what_was_short_is_had_again_once_there_is_memory(family):
    served, *_ = family
    engine = make_engine(served, step_tokens=STEP_TOKENS, rows=4)
    short = Short(engine, lambda batch: tokens_of(batch) > 1)
    cases = [Case((index, 5), None, 6 * PATIENCE) for index in range(3, 7)]
    for index, case in enumerate(cases):
        engine.scheduler.add(request(str(index), case, None), seed=0)
    engine.step()
    assert short.failures
    short.is_too_much = lambda batch: False
    finish(engine)
    short.attempts = 0
    engine.scheduler.add(request("long", Case(tuple(range(3, 3 + STEP_TOKENS)), None, 1), None), seed=0)
    finish(engine)
    assert short.attempts == 1, "one step of one piece"
    assert recorded(engine, "long").shape == (1, VOCABULARY)
