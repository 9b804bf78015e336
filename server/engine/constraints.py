"""Keeps the rows of a step that have a grammar to it: what cannot come next becomes -inf."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import torch

from prefix_store.errors import GenerationFailed
from server.engine.grammar import GrammarError
from server.scheduler.sequence import Sequence


def read_on(sequences: Rows[Sequence]) -> dict[Sequence, GenerationFailed]:
    """Reads what their last tokens were; those whose grammar cannot be followed any further, and why.

    A sequence's matcher lives as long as the sequence does, so a preemption, which keeps the tokens, changes nothing.
    """
    failed = {}
    for sequence in sequences:
        grammar = sequence.request.grammar
        if grammar is None:
            continue
        if sequence.matcher is None:
            sequence.matcher = grammar.matcher()
        try:
            sequence.matcher.read(sequence.tokens[sequence.prompt_length :])
        except GrammarError as error:
            grammar.is_spoilt = True
            failed[sequence] = GenerationFailed(f"the grammar of this answer became too complex to follow: {error}")
    return failed


def constrain(logits: torch.Tensor, sequences: Rows[Sequence]) -> None:
    """Changes `logits` `[N, V]` in place, row i by the grammar of `sequences[i]`, which `read_on` has seen."""
    rows = [i for i, sequence in enumerate(sequences) if sequence.matcher is not None]
    if rows:
        blocked = np.zeros(logits.shape, bool)
        for i in rows:
            blocked[i] = ~_allowed(sequences[i], logits.shape[-1])
        logits.masked_fill_(torch.from_numpy(blocked).to(logits.device), -torch.inf)


def _allowed(sequence: Sequence, vocabulary: int) -> np.ndarray:
    """What may come next, `[V]`. What is forbidden besides gives way where else nothing could come."""
    allowed: np.ndarray = sequence.matcher.allowed(vocabulary, sequence.request.params.stop_token_ids)
    forbidden = [token for token in sequence.forbidden if 0 <= token < vocabulary]
    if forbidden:
        rest = allowed.copy()
        rest[forbidden] = False
        return rest if rest.any() else allowed
    return allowed
