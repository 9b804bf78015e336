"""What counts as the same answer."""

from __future__ import annotations

import pytest
import torch

from server.engine import agreement
from server.engine.agreement import Answer, Difference
from server.scheduler.messages import TokenLogprob

LOGITS = torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.999]])
LOGPROBS = LOGITS.log_softmax(-1)


def answer(*tokens: int, moved: float = 0.0) -> Answer:
    entries = [
        TokenLogprob(token, float(row[token]) + moved, tuple(enumerate((row + moved).tolist())))
        for token, row in zip(tokens, LOGPROBS, strict=True)
    ]
    return Answer((7,), tuple(entries))


def test_the_likeliest_token_is_right():
    found = agreement.with_logits(answer(0, 1), LOGITS, tie=0.01)
    assert (found.tokens_differ, found.near_ties) == (0, 0)
    assert found.largest < 1e-6


def test_a_near_tie_is_excused_and_another_token_is_not():
    assert agreement.with_logits(answer(0, 2), LOGITS, tie=0.01).near_ties == 1
    assert agreement.with_logits(answer(0, 2), LOGITS, tie=0.0001).tokens_differ == 1
    assert agreement.with_logits(answer(1, 1), LOGITS, tie=0.01).tokens_differ == 1


def test_log_probabilities_count_too():
    found = agreement.with_logits(answer(0, 1, moved=0.25), LOGITS, tie=0.01)
    assert found.tokens_differ == 0
    assert (found.largest, found.mean) == (pytest.approx(0.25), pytest.approx(0.25))


def test_what_is_no_number_excuses_nothing():
    found = agreement.with_logits(answer(0, 1), LOGITS * torch.nan, tie=0.01)
    assert (found.tokens_differ, found.largest) == (2, float("inf"))


def test_two_answers_are_compared_up_to_where_they_part():
    same = agreement.with_other(answer(0, 1), answer(0, 1, moved=0.5), LOGITS, tie=0.01)
    assert (same.tokens_differ, same.largest) == (0, pytest.approx(0.5))
    tie = agreement.with_other(answer(0, 1), answer(0, 2, moved=0.5), LOGITS, tie=0.01)
    assert (tie.near_ties, tie.tokens_differ) == (1, 0)
    assert len(tie.logprobs) == 3
    assert agreement.with_other(answer(0, 1), answer(1, 1), LOGITS, tie=0.01).tokens_differ == 1


def test_differences_add_up():
    found = Difference((0.1, 0.2), 1, 0) + Difference((0.6,), 0, 2)
    assert (found.largest, found.mean, found.tokens_differ, found.near_ties) == (0.6, pytest.approx(0.3), 1, 2)
    assert (Difference().largest, Difference().mean) == (0.0, 0.0)
