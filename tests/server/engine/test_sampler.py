from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from prefix_store.errors import PrefixNumerics
from server.engine.batch import Selection
from server.engine.sampler import sample
from server.scheduler.messages import GenerationRequest, PrefixPayload
from server.scheduler.plan import Row, RowResult
from server.scheduler.sampling_params import SamplingParams
from server.scheduler.sequence import Sequence

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])


def selection(first: int = 0, seed: int = 0, prompt: int = 1, **params) -> Selection:
    request = GenerationRequest("r", "t", tuple(range(prompt)), SamplingParams(**params))
    row = Row(Sequence(request, seed), 0, prompt)
    return Selection(row, first, len(row.scored) + 1)


def results(logits: torch.Tensor, selections: list[Selection]) -> list[RowResult]:
    return sample(logits, selections).read()


def draws(count: int = 4000, logits: torch.Tensor = LOGITS, **params) -> Counter:
    selections = [selection(index, seed=index, **params) for index in range(count)]
    return Counter(result.token_id for result in results(logits.expand(count, -1), selections))


def test_greedy_takes_the_likeliest_and_the_first_of_equals():
    assert results(torch.tensor([[0.0, 3.0, 3.0]]), [selection(temperature=0.0)])[0].token_id == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    expected = (LOGITS / temperature).softmax(-1)
    counts = draws(temperature=temperature)
    for token, probability in enumerate(expected.tolist()):
        spread = 5 * math.sqrt(4000 * probability * (1 - probability)) + 1
        assert abs(counts[token] - 4000 * probability) < spread


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 1}, {0}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.6}, {0, 1}),
        ({"top_p": 1e-9}, {0}),
        ({"min_p": 0.3}, {0, 1}),
        ({"min_p": 1.0}, {0}),
        ({"top_k": 3, "top_p": 0.99, "min_p": 0.3}, {0, 1}),
    ],
)
def test_filters_keep_exactly_what_they_should(params, allowed):
    # softmax of LOGITS is about .55 .20 .12 .07 .03
    assert set(draws(600, **params)) == allowed


def test_a_row_draws_the_same_in_any_batch():
    alone = results(LOGITS[None], [selection(0, seed=5)])[0].token_id
    others = [selection(i, seed=i, temperature=0.3 * i, top_k=i % 3) for i in range(5)]
    batch = [*others, selection(5, seed=5), selection(6, seed=9)]
    logits = torch.cat([torch.randn(5, 5), LOGITS[None], torch.randn(1, 5)])
    assert results(logits, batch)[5].token_id == alone


def random_row(draw: random.Random, vocabulary: int) -> dict:
    """Parameters that use every option now and then, for a request of its own."""
    bias = tuple((token, draw.uniform(-5, 5)) for token in draw.sample(range(vocabulary), draw.choice([0, 4])))
    return {
        "seed": draw.getrandbits(40),
        "prompt": draw.randint(1, 6),
        "answer": draw.choices(range(vocabulary), k=draw.randint(0, 20)),
        "temperature": draw.choice([0.0, 0.0, 0.5, 1.0, 1.6]),
        "top_k": draw.choice([0, 0, 3, 20]),
        "top_p": draw.choice([1.0, 0.9, 0.4]),
        "min_p": draw.choice([0.0, 0.0, 0.1]),
        "repetition_penalty": draw.choice([1.0, 1.0, 1.3]),
        "presence_penalty": draw.choice([0.0, 1.0]),
        "frequency_penalty": draw.choice([0.0, 0.5]),
        "logit_bias": bias,
        "min_tokens": draw.choice([0, 10]),
        "stop_token_ids": frozenset({2, 5}),
        "logprobs": draw.choice([None, 0, 2, 20]),
        "echo": draw.random() < 0.3,
    }


def run(logits: list[torch.Tensor], rows: list[dict]) -> list[RowResult]:
    """Samples rows as one batch; row i has as many logits `[_, V]` as it wants."""
    selections, first = [], 0
    for scores, row in zip(logits, rows, strict=True):
        answer = row["answer"]
        made = selection(first, **{name: value for name, value in row.items() if name != "answer"})
        made.row.sequence.tokens.extend(answer)
        made = Selection(Row(made.row.sequence, 0, len(made.row.sequence.tokens)), first, len(scores))
        selections.append(made)
        first += len(scores)
    return results(torch.cat(logits), selections)


def wanted(row: dict) -> int:
    """How many positions a row's logits are wanted for: all of an echoed prompt, and the last."""
    return row["prompt"] if row["echo"] and row["logprobs"] is not None else 1


@pytest.mark.parametrize("seed", range(40))
def test_a_row_is_the_same_to_the_last_bit_in_any_batch_and_beside_rows_that_fail(seed):
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    vocabulary = draw.choice([24, 900])
    rows = [random_row(draw, vocabulary) for _ in range(12)]
    logits = [3 * torch.randn(wanted(row), vocabulary, generator=generator) for row in rows]
    bad = draw.sample(range(12), 3)
    for index in bad:
        logits[index][draw.randrange(len(logits[index])), draw.randrange(vocabulary)] = draw.choice(
            [torch.nan, torch.inf]
        )
    together = run(logits, rows)
    for index, row in enumerate(rows):
        (alone,) = run([logits[index]], [row])
        assert replace(together[index], error=None) == replace(alone, error=None)
        assert [isinstance(found.error, PrefixNumerics) for found in (together[index], alone)] == [index in bad] * 2


@pytest.mark.parametrize("seed", range(30))
def test_tokens_are_those_that_transformers_processors_leave(seed):
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows = [{**random_row(draw, 50), "presence_penalty": 0.0, "frequency_penalty": 0.0} for _ in range(20)]
    logits = [3 * torch.randn(1, 50, generator=generator) for _ in rows]
    results = run(logits, [{**row, "echo": False} for row in rows])
    assert [result.token_id for result in results] == [
        by_transformers(*pair) for pair in zip(logits, rows, strict=True)
    ]


@pytest.mark.parametrize(
    "left_out",
    [
        {"repetition_penalty": 1.0},
        {"logit_bias": ()},
        {"min_tokens": 0},
        {"top_k": 0},
        {"top_p": 1.0},
        {"min_p": 0.0},
        {"temperature": 1.0},
        {"prompt": 1},
        {"answer": []},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_an_option_left_out_is_seen(left_out):
    draw, generator = random.Random(0), torch.Generator().manual_seed(0)
    off = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "echo": False}
    rows = [{**random_row(draw, 50), **off} for _ in range(300)]
    logits = [3 * torch.randn(1, 50, generator=generator) for _ in rows]
    results = run(logits, [{**row, **left_out} for row in rows])
    assert [result.token_id for result in results] != [
        by_transformers(*pair) for pair in zip(logits, rows, strict=True)
    ]


def by_transformers(logits: torch.Tensor, row: dict) -> int:
    """The same choice in plain steps: transformers' processors in transformers' order, then the row's own draw."""
    prompt, answer = list(range(row["prompt"])), row["answer"]
    greedy = row["temperature"] == 0
    chain = LogitsProcessorList()
    if row["logit_bias"]:
        chain.append(SequenceBiasLogitsProcessor([[[token], bias] for token, bias in row["logit_bias"]]))
    chain.append(RepetitionPenaltyLogitsProcessor(row["repetition_penalty"]))
    chain.append(MinNewTokensLengthLogitsProcessor(len(prompt), row["min_tokens"], [2, 5]))
    if not greedy:
        chain.append(TemperatureLogitsWarper(row["temperature"]))
        chain.extend([TopKLogitsWarper(row["top_k"])] if row["top_k"] else [])
        chain.extend([TopPLogitsWarper(row["top_p"]), MinPLogitsWarper(row["min_p"])])
    left = chain(torch.tensor([prompt + answer]), logits)
    if greedy:
        return int(left.argmax())
    sequence = selection(seed=row["seed"], prompt=row["prompt"]).row.sequence
    sequence.tokens.extend(answer)
    cumulative = left.double().softmax(-1).cumsum(-1)[0]
    return int((cumulative > sequence.uniform(len(sequence.tokens))).nonzero()[0])


def test_greedy_takes_the_likeliest_of_what_the_options_leave():
    asked = {"temperature": 0.0, "prompt": 1}  # the prompt is token 0
    assert results(LOGITS[None], [selection(**asked)])[0].token_id == 0
    assert results(LOGITS[None], [selection(**asked, repetition_penalty=3.0)])[0].token_id == 1
    assert results(LOGITS[None], [selection(**asked, logit_bias=((3, 5.0),))])[0].token_id == 3
    held = selection(**asked, stop_token_ids=frozenset({0, 1}), min_tokens=1)
    assert results(LOGITS[None], [held])[0].token_id == 2


def test_a_prefix_adds_nothing_to_what_is_penalised():
    made = selection(repetition_penalty=3.0, temperature=0.0)
    payload = PrefixPayload("p", 5, 5, True, None)
    sequence = Sequence(replace(made.row.sequence.request, prefix=payload), 0)
    assert sequence.occurrences() == {0: 0}
    assert results(LOGITS[None], [Selection(Row(sequence, 0, 1), 0, 1)])[0].token_id == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_when_nothing_else_is_left_a_row_takes_what_it_should_not(temperature):
    held = selection(stop_token_ids=frozenset(range(5)), min_tokens=1, temperature=temperature)
    result = results(LOGITS[None], [held])[0]
    assert result.error is None
    assert result.token_id in range(5)


def test_choices_of_one_seed_differ_and_come_again():
    flat = torch.zeros(8, 1000)
    choices = [[r.token_id for r in results(flat, [selection(i, seed=7 + i) for i in range(8)])] for _ in range(2)]
    assert choices[0] == choices[1]
    assert len(set(choices[0])) == 8
    assert results(flat[:1], [selection(0, seed=7 + 3)])[0].token_id == choices[0][3]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.2, "logit_bias": ((3, -100.0),), "top_p": 0.9}])
def test_a_row_that_overflows_fails_alone(bad, temperature, options):
    logits = LOGITS.repeat(3, 1)
    logits[1, 3] = bad
    found = results(logits, [selection(i, temperature=temperature, seed=i, **options) for i in range(3)])
    assert [isinstance(result.error, PrefixNumerics) for result in found] == [False, True, False]
    assert found[1].token_id is None


def test_a_scored_prompt_position_that_overflows_fails_its_row():
    logits = LOGITS.repeat(2, 1)
    logits[0, 2] = torch.nan
    result = results(logits, [selection(prompt=2, temperature=0.0, logprobs=0, echo=True)])[0]
    assert isinstance(result.error, PrefixNumerics)


def test_logprobs_are_those_of_the_bare_softmax():
    result = results(LOGITS[None], [selection(temperature=0.0, logprobs=2)])[0]
    expected = LOGITS.log_softmax(-1)
    assert result.logprob.token_id == 0
    assert result.logprob.logprob == pytest.approx(float(expected[0]))
    assert [token for token, _ in result.logprob.top] == [0, 1]
    assert result.logprob.top[0][1] == result.logprob.logprob


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logprobs_are_of_the_models_own_logits_whatever_the_options(temperature):
    options = {"repetition_penalty": 5.0, "presence_penalty": 2.0, "logit_bias": ((4, 100.0),), "top_k": 1}
    result = results(LOGITS[None], [selection(temperature=temperature, logprobs=1, **options)])[0]
    expected = LOGITS.log_softmax(-1)
    assert (result.token_id, result.logprob.token_id) == (4, 4)
    assert result.logprob.logprob == float(expected[4])
    assert result.logprob.top == ((0, float(expected[0])),)


@pytest.mark.parametrize("count", range(21))
def test_as_many_of_the_likeliest_are_given_as_asked_for(count):
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(count))
    result = results(logits, [selection(temperature=0.0, logprobs=count)])[0]
    expected = logits[0].log_softmax(-1).sort(descending=True)
    assert result.logprob.top == tuple(zip(expected.indices.tolist(), expected.values.tolist(), strict=True))[:count]


def test_prompt_positions_are_scored_by_the_token_that_follows():
    logits = torch.stack([LOGITS, LOGITS.flip(0), LOGITS])
    result = results(logits, [selection(prompt=3, temperature=0.0, logprobs=0, echo=True)])[0]
    assert [scored.token_id for scored in result.scored] == [1, 2]
    assert result.scored[0].logprob == pytest.approx(float(logits[0].log_softmax(-1)[1]))
    assert result.scored[1].logprob == pytest.approx(float(logits[1].log_softmax(-1)[2]))
