"""Rows of a mixed batch, each with sampling options of its own, say what transformers says of each alone."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from transformers import PreTrainedModel
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from prefix_store.errors import PrefixNumerics
from prefix_store.model.frozen import FrozenModel
from server.engine.engine import Engine
from server.scheduler.messages import FinishReason, GenerationRequest, PrefixPayload, TokenEvent
from server.scheduler.sampling_params import SamplingParams
from tests.models import EOS, random_kv, tiny_frozen, tiny_model
from tests.parity.harness import make_engine, payload, plain_logits, recorded

PROMPTS = [(5, 6, 7), (9,), (40, 41, 40, 41, 40), tuple(range(60, 90))]
PENALTIES = [1.0, 1.3, 2.0, 0.8]
NEW = 24


@pytest.fixture(scope="module")
def served() -> FrozenModel:
    return tiny_frozen("llama")


@pytest.fixture(scope="module")
def plain() -> PreTrainedModel:
    return tiny_model("llama")


def request(name: str, prompt: tuple[int, ...], prefix: PrefixPayload | None = None, **params) -> GenerationRequest:
    return GenerationRequest(name, "t", prompt, SamplingParams(**{"max_tokens": NEW, **params}), prefix)


def run(engine: Engine, *requests: GenerationRequest) -> dict[str, list[int]]:
    """Every request's tokens, all of them in one engine at once."""
    tokens: dict[str, list[int]] = defaultdict(list)
    for event in steps(engine, *requests):
        assert event.finish_reason is not FinishReason.ERROR, event
        tokens[event.request_id].extend(event.token_ids)
    return tokens


def steps(engine: Engine, *requests: GenerationRequest) -> list[TokenEvent]:
    for made in requests:
        engine.scheduler.add(made, made.params.seed or 0)
    events = []
    while engine.scheduler.running or engine.scheduler.waiting:
        events += engine.step()
    return events


def by_transformers(plain: PreTrainedModel, prompt: tuple[int, ...], **options) -> list[int]:
    ids = torch.tensor([prompt])
    found = plain.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=EOS, **options
    )
    return found[0, len(prompt) :].tolist()


def greedy(name: str, prompt: tuple[int, ...], penalty: float) -> GenerationRequest:
    return request(name, prompt, temperature=0.0, repetition_penalty=penalty, stop_token_ids=frozenset({EOS}))


def test_greedy_rows_with_a_repetition_penalty_are_transformers_generate(served, plain):
    pairs = [(prompt, penalty) for prompt in PROMPTS for penalty in PENALTIES]
    tokens = run(make_engine(served), *(greedy(str(i), *pair) for i, pair in enumerate(pairs)))
    expected = [by_transformers(plain, prompt, repetition_penalty=penalty) for prompt, penalty in pairs]
    assert [tokens[str(i)] for i in range(len(pairs))] == [without_eos(ids) for ids in expected]
    assert len({tuple(ids) for ids in expected}) > len(PROMPTS)  # the penalty matters


def test_a_preempted_row_counts_its_own_answer_once(served, monkeypatch):
    monkeypatch.setattr("server.scheduler.admission.HEADROOM", 1)
    engine = make_engine(served, slots=90, rows=8, step_tokens=16)
    made = [
        request(str(i), prompt, temperature=0.0, ignore_eos=True, frequency_penalty=1.5, repetition_penalty=1.2)
        for i, prompt in enumerate(PROMPTS[:3])
    ]
    alone = [run(make_engine(served), one)[one.id] for one in made]
    tokens = run(engine, *made)
    assert engine.scheduler.admission.preemptions > 0
    assert [tokens[one.id] for one in made] == alone


def test_virtual_tokens_of_a_prefix_are_not_penalised(served, plain):
    kv = random_kv(served, 6)
    prompt, penalty = PROMPTS[2], 1.6
    made = request("p", prompt, payload(kv, "p"), temperature=0.0, ignore_eos=True, repetition_penalty=penalty)
    bare = request("bare", prompt, temperature=0.0, ignore_eos=True, repetition_penalty=penalty)
    tokens = run(make_engine(served), made, bare)
    ids, process = list(prompt), RepetitionPenaltyLogitsProcessor(penalty)
    for _ in range(NEW):
        ids.append(int(process(torch.tensor([ids]), plain_logits(plain, ids, kv)[-1:]).argmax()))
    assert tokens["p"] == ids[len(prompt) :]
    assert tokens["bare"] != tokens["p"]


def test_the_end_of_text_does_not_come_before_min_tokens(served, plain):
    """A bias makes every row want to end at once; the reference is transformers' `sequence_bias`, `min_new_tokens`."""
    engine = make_engine(served)
    ends = {"logit_bias": ((EOS, 100.0),), "temperature": 0.0}
    made = [request(str(count), PROMPTS[0], min_tokens=count, **ends) for count in (0, 1, 7, NEW)]
    tokens = run(engine, *made)
    bias = [[[EOS], 100.0]]
    for one in made:
        count = one.params.min_tokens
        expected = by_transformers(plain, PROMPTS[0], sequence_bias=bias, min_new_tokens=count)
        assert tokens[one.id] == without_eos(expected)
        assert len(tokens[one.id]) == count


def test_seeded_rows_draw_the_same_alone_and_among_others(served):
    options = [
        {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2},
        {"temperature": 1.3, "top_k": 20, "min_p": 0.05, "presence_penalty": 1.0},
        {"frequency_penalty": 0.5, "logit_bias": ((70, 3.0), (71, -100.0))},
        {},
    ]
    made = [
        request(f"{i} {seed}", PROMPTS[i], ignore_eos=True, seed=seed, **chosen)
        for i, chosen in enumerate(options)
        for seed in (3, 4)
    ]
    together = run(make_engine(served), *made)
    assert len({tuple(ids) for ids in together.values()}) == len(made)
    for one in made:
        assert run(make_engine(served, step_tokens=4), one)[one.id] == together[one.id]


def test_a_finite_prefix_that_overflows_fails_alone_and_leaves_its_neighbours_bits(served):
    fine, huge = random_kv(served, 4), torch.full_like(random_kv(served, 4), 1e30)
    huge[:, 1] = 3e38
    assert huge.isfinite().all()
    options = {"ignore_eos": True, "repetition_penalty": 1.2}
    good = request("good", PROMPTS[0], seed=1, **options)
    beside_fine, beside_huge = make_engine(served), make_engine(served)
    expected = run(beside_fine, good, request("other", PROMPTS[1], payload(fine, "fine"), **options))
    events = steps(beside_huge, good, request("other", PROMPTS[1], payload(huge, "huge"), **options))
    (failed,) = [event for event in events if event.request_id == "other"]
    assert failed.finish_reason is FinishReason.ERROR
    assert isinstance(failed.error, PrefixNumerics)
    assert [token for event in events for token in event.token_ids] == expected["good"]
    assert torch.equal(recorded(beside_huge, "good")[0], recorded(beside_fine, "good")[0])


def without_eos(ids: list[int]) -> list[int]:
    return ids[: ids.index(EOS)] if EOS in ids else ids
