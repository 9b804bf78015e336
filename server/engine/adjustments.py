"""What changes a row's logits before a token is chosen: its bias, its penalties, its grammar, what it may not say yet.

In the order of transformers and vLLM. Only the logits that change are touched, those of all rows at once and each by
itself, so a row's are the same in any batch, and a row without such options costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Rows
from itertools import chain

import numpy as np
import torch

from server.engine.constraints import constrain
from server.scheduler.sequence import Sequence

Cells = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def adjust(logits: torch.Tensor, sequences: Rows[Sequence]) -> None:
    """Changes finite `logits` `[N, V]` in place, row i as `sequences[i]` asks; what may not come becomes -inf."""
    _add_bias(logits, sequences)
    _penalise(logits, sequences)
    _forbid(logits, sequences)
    _force(logits, sequences)
    constrain(logits, sequences)


def _add_bias(logits: torch.Tensor, sequences: Rows[Sequence]) -> None:
    biases = [dict(sequence.request.params.logit_bias) for sequence in sequences]
    if any(biases):
        rows, tokens, bias = _cells(biases, logits)
        logits[rows, tokens] += bias


def _penalise(logits: torch.Tensor, sequences: Rows[Sequence]) -> None:
    params = [sequence.request.params for sequence in sequences]
    if not any(p.penalises for p in params):
        return
    rows, tokens, counts = _cells([s.occurrences() if s.request.params.penalises else {} for s in sequences], logits)
    repetition, frequency, presence = (
        torch.tensor(numbers, device=logits.device)[rows]
        for numbers in zip(
            *((p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params), strict=True
        )
    )
    found = logits[rows, tokens]
    found = torch.where(found > 0, found / repetition, found * repetition)
    logits[rows, tokens] = found - frequency * counts - presence * (counts > 0)


def _forbid(logits: torch.Tensor, sequences: Rows[Sequence]) -> None:
    # a grammar's rows are `constrain`'s, for it knows where nothing else could come
    forbidden = [dict.fromkeys(s.forbidden if s.request.grammar is None else (), 0) for s in sequences]
    if any(forbidden):
        rows, tokens, _ = _cells(forbidden, logits)
        logits[rows, tokens] = -torch.inf


def _force(logits: torch.Tensor, sequences: Rows[Sequence]) -> None:
    for index, sequence in enumerate(sequences):
        if sequence.forced is not None:
            logits[index].fill_(-torch.inf)[sequence.forced] = 0


def _cells(values: Rows[Mapping[int, float]], logits: torch.Tensor) -> Cells:
    """Rows, token ids and values of what there is for each row, without ids that have no logit."""
    sizes = [len(row) for row in values]
    # numpy reads a mapping's numbers several times as fast as torch does
    rows = np.repeat(np.arange(len(values)), sizes)
    tokens = np.fromiter(chain.from_iterable(values), np.int64, sum(sizes))
    numbers = np.fromiter(chain.from_iterable(row.values() for row in values), np.float32, sum(sizes))
    known = (tokens >= 0) & (tokens < logits.shape[-1])
    where, which, what = (torch.from_numpy(column[known]).to(logits.device) for column in (rows, tokens, numbers))
    return where, which, what
