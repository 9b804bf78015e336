from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from server.engine.batch import Selection
from server.engine.sampler import NUMERICS, sample
from server.scheduler.messages import GenerationRequest
from server.scheduler.plan import Row
from server.scheduler.sampling_params import SamplingParams
from server.scheduler.sequence import Sequence

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])


def selection(first: int = 0, seed: int = 0, prompt: int = 1, **params) -> Selection:
    request = GenerationRequest("r", "t", tuple(range(prompt)), SamplingParams(**params))
    row = Row(Sequence(request, seed), 0, prompt)
    return Selection(row, first, len(row.scored) + 1)


def draws(count: int = 4000, logits: torch.Tensor = LOGITS, **params) -> Counter:
    selections = [selection(index, seed=index, **params) for index in range(count)]
    return Counter(result.token_id for result in sample(logits.expand(count, -1), selections))


def test_greedy_takes_the_likeliest_and_the_first_of_equals():
    assert sample(torch.tensor([[0.0, 3.0, 3.0]]), [selection(temperature=0.0)])[0].token_id == 1


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
    alone = sample(LOGITS[None], [selection(0, seed=5)])[0].token_id
    others = [selection(i, seed=i, temperature=0.3 * i, top_k=i % 3) for i in range(5)]
    batch = [*others, selection(5, seed=5), selection(6, seed=9)]
    logits = torch.cat([torch.randn(5, 5), LOGITS[None], torch.randn(1, 5)])
    assert sample(logits, batch)[5].token_id == alone


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_overflows_fails_alone(bad, temperature):
    logits = LOGITS.repeat(3, 1)
    logits[1, 3] = bad
    results = sample(logits, [selection(i, temperature=temperature, seed=i) for i in range(3)])
    assert [result.error for result in results] == [None, NUMERICS, None]
    assert results[1].token_id is None


def test_a_scored_prompt_position_that_overflows_fails_its_row():
    logits = LOGITS.repeat(2, 1)
    logits[0, 2] = torch.nan
    result = sample(logits, [selection(prompt=2, temperature=0.0, logprobs=0, echo=True)])[0]
    assert result.error == NUMERICS


def test_logprobs_are_those_of_the_bare_softmax():
    result = sample(LOGITS[None], [selection(temperature=0.0, logprobs=2)])[0]
    expected = LOGITS.log_softmax(-1)
    assert result.logprob.token_id == 0
    assert result.logprob.logprob == pytest.approx(float(expected[0]))
    assert [token for token, _ in result.logprob.top] == [0, 1]
    assert result.logprob.top[0][1] == result.logprob.logprob


def test_prompt_positions_are_scored_by_the_token_that_follows():
    logits = torch.stack([LOGITS, LOGITS.flip(0), LOGITS])
    result = sample(logits, [selection(prompt=3, temperature=0.0, logprobs=0, echo=True)])[0]
    assert [scored.token_id for scored in result.scored] == [1, 2]
    assert result.scored[0].logprob == pytest.approx(float(logits[0].log_softmax(-1)[1]))
    assert result.scored[1].logprob == pytest.approx(float(logits[1].log_softmax(-1)[2]))
