"""From logits to the tokens that beams may go on with, for all beams of a step at once."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch

from server.engine.adjustments import adjust
from server.scheduler.messages import TokenLogprob
from server.scheduler.plan import Candidate
from server.scheduler.sampling_params import MAX_LOGPROBS
from server.scheduler.sequence import Sequence


def candidates(logits: torch.Tensor, sequences: Rows[Sequence]) -> list[tuple[Candidate, ...]]:
    """The likeliest next tokens of each, best first: the group's width of them beside those that may end it.

    `logits` `[N, V]` are left alone. As in transformers, what changes logits changes log-probabilities here, and
    nothing makes their sum 1 again.
    """
    bare = logits.log_softmax(-1)
    adjusted = bare
    if any(sequence.is_adjusted for sequence in sequences):
        adjusted = bare.clone()
        adjust(adjusted, sequences)
    counts = [min(sequence.width + len(sequence.end_ids), logits.shape[-1]) for sequence in sequences]
    found: list[tuple[Candidate, ...]] = [()] * len(sequences)
    # one call for equal counts: how equals are ordered could turn on how many a neighbour wants
    for count in set(counts):
        rows = [row for row, wanted in enumerate(counts) if wanted == count]
        values, ids = adjusted[rows].topk(count)
        for row, tokens, logprobs in zip(rows, ids.tolist(), values.tolist(), strict=True):
            scored = _scored(bare[row], tokens, sequences[row].request.params.logprobs)
            found[row] = tuple(map(Candidate, tokens, logprobs, scored))
    return found


def _scored(bare: torch.Tensor, tokens: list[int], top: int | None) -> list[TokenLogprob | None]:
    """The model's own log-probability of each, and the likeliest `top`'s; None where they are not wanted."""
    if top is None:
        return [None] * len(tokens)
    values, ids = bare.topk(min(MAX_LOGPROBS, len(bare)))
    best = tuple(zip(ids.tolist(), values.tolist(), strict=True))[:top]
    return [TokenLogprob(*pair, best) for pair in zip(tokens, bare[tokens].tolist(), strict=True)]
