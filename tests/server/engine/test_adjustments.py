from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers.generation.logits_process import (
    ForcedEOSTokenLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from server.engine.adjustments import adjust
from server.scheduler.messages import GenerationRequest
from server.scheduler.sampling_params import SamplingParams
from server.scheduler.sequence import Sequence

VOCABULARY = 60
PROMPT, ANSWER = (3, 9, 3, 27), (9, 41, 41, 5, 41)


def sequence(prompt: tuple[int, ...] = PROMPT, answer: tuple[int, ...] = ANSWER, **params) -> Sequence:
    made = Sequence(GenerationRequest("r", "t", prompt, SamplingParams(**params)), seed=0)
    made.tokens.extend(answer)
    return made


def adjusted(logits: torch.Tensor, *sequences: Sequence) -> torch.Tensor:
    result = logits.clone()
    adjust(result, sequences)
    return result


def random_logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return 4 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("penalty", [0.5, 1.1, 1.7, 100.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty):
    logits = random_logits()
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([[*PROMPT, *ANSWER]]), logits)
    assert torch.equal(adjusted(logits, sequence(repetition_penalty=penalty)), expected)
    # a penalty a little off, the prompt left out, and a token counted twice are all seen
    assert not torch.equal(adjusted(logits, sequence(repetition_penalty=penalty - 0.01)), expected)
    assert not torch.equal(adjusted(logits, sequence(prompt=(9,), repetition_penalty=penalty)), expected)
    twice = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([[41]]), expected)
    assert not torch.equal(twice, expected)


@pytest.mark.parametrize(("presence", "frequency"), [(1.5, 0.0), (0.0, 0.7), (-2.0, 2.0), (0.3, -0.2)])
def test_presence_and_frequency_penalties_are_openais_formula_over_the_answer(presence, frequency):
    logits = random_logits()
    expected = logits.clone()
    for token, count in Counter(ANSWER).items():
        expected[0, token] -= count * frequency + (count > 0) * presence
    found = adjusted(logits, sequence(presence_penalty=presence, frequency_penalty=frequency))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert torch.equal(found[0, [3, 27]], logits[0, [3, 27]])  # the prompt's own tokens do not count
    assert not torch.allclose(adjusted(logits, sequence(answer=(41,), frequency_penalty=0.7)), expected)


def test_logit_bias_is_added():
    logits, bias = random_logits(), {0: 100.0, 9: -100.0, VOCABULARY - 1: 2.5}
    expected = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])(None, logits)
    assert torch.equal(adjusted(logits, sequence(logit_bias=tuple(bias.items()))), expected)
    assert not torch.equal(adjusted(logits, sequence(logit_bias=((1, 100.0),))), expected)


@pytest.mark.parametrize("generated", range(5))
def test_stop_ids_cannot_come_before_min_tokens(generated):
    logits = random_logits()
    ids = torch.tensor([[*PROMPT, *ANSWER[:generated]]])
    expected = MinNewTokensLengthLogitsProcessor(len(PROMPT), 3, [1, 7])(ids, logits)
    found = sequence(answer=ANSWER[:generated], min_tokens=3, stop_token_ids=frozenset({1, 7}))
    assert torch.equal(adjusted(logits, found), expected)
    assert torch.equal(expected, logits) == (generated >= 3)


def test_bias_comes_before_penalties():
    logits = torch.tensor([[-1.0, 0.5]])
    found = sequence(prompt=(0,), answer=(), logit_bias=((0, 3.0),), repetition_penalty=2.0)
    assert adjusted(logits, found).tolist() == [[1.0, 0.5]]  # (-1 + 3) / 2, not -1 * 2 + 3


def test_ids_that_have_no_logit_are_passed_over():
    logits, far = random_logits(), VOCABULARY
    found = sequence(
        prompt=(far,),
        answer=(far + 1,),
        logit_bias=((far, 9.0),),
        repetition_penalty=2.0,
        min_tokens=9,
        stop_token_ids=frozenset({far, -1, 2**63 - 1}),
    )
    assert torch.equal(adjusted(logits, found), logits)


@pytest.mark.parametrize("seed", range(20))
def test_a_row_is_adjusted_the_same_in_any_batch(seed):
    draw = random.Random(seed)
    sequences = [
        sequence(
            prompt=tuple(draw.choices(range(VOCABULARY), k=draw.randint(1, 30))),
            answer=tuple(draw.choices(range(VOCABULARY), k=draw.randint(0, 30))),
            repetition_penalty=draw.choice([1.0, 1.3, 0.8]),
            presence_penalty=draw.choice([0.0, 1.1]),
            frequency_penalty=draw.choice([0.0, -0.4]),
            logit_bias=tuple(
                (token, draw.uniform(-100, 100)) for token in draw.sample(range(VOCABULARY), draw.choice([0, 5]))
            ),
            min_tokens=draw.choice([0, 15]),
            stop_token_ids=frozenset(draw.sample(range(VOCABULARY), 2)),
        )
        for _ in range(12)
    ]
    logits = random_logits(12, seed)
    together = adjusted(logits, *sequences)
    for index, found in enumerate(sequences):
        assert torch.equal(together[index], adjusted(logits[index : index + 1], found)[0])


@pytest.mark.parametrize("logit", [3e38, -3e38, 0.0, -torch.inf])
@pytest.mark.parametrize("penalty", [0.01, 100.0])
def test_no_option_makes_a_number_no_number(logit, penalty):
    logits = torch.full((1, VOCABULARY), logit)
    logits[0, 1] = 1.0
    found = sequence(
        repetition_penalty=penalty,
        presence_penalty=2.0,
        frequency_penalty=-2.0,
        logit_bias=tuple((token, -100.0) for token in range(VOCABULARY)),
        min_tokens=100,
        stop_token_ids=frozenset({5}),
    )
    assert not adjusted(logits, found).isnan().any()


@pytest.mark.parametrize(("tokens", "forced"), [(5, False), (6, True)])
def test_the_last_token_is_the_models_own_end_as_in_transformers(tokens, forced):
    logits, made = random_logits(), sequence(max_tokens=6)
    made.request = replace(made.request, last_id=7, banned_ids=frozenset({8, 9}))
    made.tokens = [*PROMPT, *range(tokens - 1)]
    ids = torch.tensor([made.tokens])
    expected = NoBadWordsLogitsProcessor([[8], [9]], eos_token_id=torch.tensor([59]))(ids, logits)
    expected = ForcedEOSTokenLogitsProcessor(len(PROMPT) + 6, 7)(ids, expected)
    assert torch.equal(adjusted(logits, made), expected)
    assert (int(adjusted(logits, made).isfinite().sum()) == 1) == forced
    assert made.is_adjusted


def test_who_wants_no_end_is_not_given_one():
    made = sequence(max_tokens=5, ignore_eos=True)
    made.request = replace(made.request, last_id=7)
    made.tokens = [*PROMPT, 1, 2, 3, 4]
    assert (made.forced, made.is_adjusted) == (None, False)
