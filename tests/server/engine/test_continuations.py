from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from server.engine.continuations import candidates
from server.scheduler.messages import GenerationRequest
from server.scheduler.sampling_params import SamplingParams
from server.scheduler.sequence import Sequence

VOCABULARY, EOS = 60, 1


def sequence(beams: int = 3, **params) -> Sequence:
    made = Sequence(GenerationRequest("r", "t", (3, 9), SamplingParams(num_beams=beams, **params)), 0, frozenset({EOS}))
    made.tokens.extend((9, 41))
    return made


def random_logits(rows: int) -> torch.Tensor:
    return 4 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(0))


def test_candidates_are_the_likeliest_and_one_more_for_each_end():
    logits = random_logits(2)
    before = logits.clone()
    few, many = candidates(logits, [sequence(), sequence(6, stop_token_ids=frozenset({7, 8}))])
    assert (len(few), len(many)) == (4, 9)
    for row, found in enumerate((few, many)):
        expected = logits[row].log_softmax(-1).topk(len(found))
        assert [each.token_id for each in found] == expected.indices.tolist()
        assert [each.logprob for each in found] == expected.values.tolist()
        assert all(each.scored is None for each in found)
    assert torch.equal(logits, before)


def test_options_change_log_probabilities_as_in_transformers():
    logits = random_logits(1)
    logits[0, [9, 20, EOS]] = logits.max()
    options = {"repetition_penalty": 1.7, "logit_bias": ((20, 3.0), (EOS, 9.0)), "min_tokens": 3}
    (found,) = candidates(logits, [sequence(**options)])
    ids, expected = torch.tensor([[3, 9, 9, 41]]), logits.log_softmax(-1)
    for process in (
        SequenceBiasLogitsProcessor([[[20], 3.0], [[EOS], 9.0]]),
        RepetitionPenaltyLogitsProcessor(1.7),
        MinNewTokensLengthLogitsProcessor(2, 3, EOS, device="cpu"),
    ):
        expected = process(ids, expected)
    best = expected[0].topk(4)
    assert [each.token_id for each in found] == best.indices.tolist()
    assert [each.logprob for each in found] == best.values.tolist()
    assert [each.logprob for each in candidates(logits, [sequence()])[0]] != best.values.tolist()


@pytest.mark.parametrize("wanted", [0, 2, 20])
def test_logprobs_are_the_models_own(wanted):
    logits = random_logits(1)
    (found,) = candidates(logits, [sequence(logprobs=wanted, logit_bias=((20, 50.0),))])
    own = logits[0].log_softmax(-1)
    assert found[0].token_id == 20
    for each in found:
        assert each.scored.token_id == each.token_id
        assert each.scored.logprob == float(own[each.token_id])
        assert [token for token, _ in each.scored.top] == own.topk(wanted).indices.tolist()
    assert found[0].logprob == pytest.approx(found[0].scored.logprob + 50)


def test_a_neighbour_changes_nothing_of_a_row():
    logits = random_logits(3)
    logits[:, 30:] = logits[:, 29:30]  # equals, whose order is anybody's
    rows = [sequence(2), sequence(40, repetition_penalty=2.0), sequence(9, logprobs=20)]
    together = candidates(logits, rows)
    assert together == [candidates(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
