from __future__ import annotations

import pytest

from prefix_store.errors import PrefixNumerics
from server.scheduler import outcome
from server.scheduler.messages import FinishReason, TokenEvent, TokenLogprob
from server.scheduler.plan import Row, RowResult
from tests.server.scheduler.traffic import make_sequence

SCORED = TokenLogprob(7, -0.5)


def test_a_chunk_that_does_not_reach_the_end_gives_no_event():
    sequence = make_sequence(prompt=4)
    assert outcome.take(sequence, [Row(sequence, 0, 3)], [RowResult(scored=[SCORED])]) == (None, 0)
    assert (sequence.computed, sequence.prompt_logprobs, len(sequence.tokens)) == (3, [SCORED], 4)


@pytest.mark.parametrize(("new", "reason"), [(1, FinishReason.LENGTH), (2, None)])
def test_a_token_is_taken_and_told(new, reason):
    sequence = make_sequence(prompt=4, new=new)
    event, sampled = outcome.take(sequence, [Row(sequence, 0, 4)], [RowResult(7, SCORED)])
    assert (event, sampled) == (TokenEvent("r", (7,), reason, (SCORED,)), 1)
    assert (sequence.tokens[-1], sequence.computed, sequence.remaining) == (7, 4, 1)


def test_an_error_ends_the_sequence_with_its_text():
    sequence = make_sequence(prompt=4)
    overflow = PrefixNumerics()
    event, sampled = outcome.take(sequence, [Row(sequence, 0, 4)], [RowResult(error=overflow)])
    assert (event, sampled) == (TokenEvent("r", finish_reason=FinishReason.ERROR, error=overflow), 0)
    assert len(sequence.tokens) == 4


def test_the_rows_of_a_group_come_together_and_all_others_alone():
    first, group, other, last = (make_sequence(beams=beams) for beams in (1, 3, 2, 1))
    rows = [Row(sequence, 0, 1) for sequence in (first, *[group.beams[0]] * 3, *[other.beams[0]] * 2, last)]
    results = [RowResult(index) for index in range(len(rows))]
    found = list(outcome.by_sequence(rows, results))
    assert [sequence for sequence, _, _ in found] == [first, group, other, last]
    assert [[result.token_id for result in own] for _, _, own in found] == [[0], [1, 2, 3], [4, 5], [6]]
    assert [row for _, own, _ in found for row in own] == rows
    with pytest.raises(ValueError, match="zip"):
        list(outcome.by_sequence(rows, results[:-1]))
