"""What a job that leaves options open gets, by how many examples it has and how long they are.

Measured on the bundled model with `prefix` at its learning rate of 0.1, by validation loss (docs/training.md has the
table): of 30 to 50 examples the best prefix comes within 60 steps and a longer run finds no better one, of 1,000
every doubling of the steps up to three epochs gains; 4, 16 and 32 virtual tokens differ by 0.03 nats.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from prefix_store.errors import ContextLengthExceeded
from prefix_store.jobs import TrainingSpec

ROOM_LEAST = 2  # a token to predict from and one to predict
VIRTUAL_TOKENS, CONTEXT_SHARE = 16, 8  # at most the eighth part of a context
LONGEST = 512  # tokens; attention's memory grows with the square
BATCH, STEP_TOKENS = 8, 2048  # examples a step, fewer where they have more tokens than that together
EPOCHS, STEPS_LEAST, STEPS_MOST = 8, 100, 1500


def fill_room(spec: TrainingSpec, lengths: Sequence[int], context_length: int) -> TrainingSpec:
    """Chooses `virtual_tokens` and `max_length` where they are open; `lengths` of the examples in tokens."""
    spec = _filled(spec, "virtual_tokens", max(1, min(VIRTUAL_TOKENS, context_length // CONTEXT_SHARE)))
    room = context_length - spec.virtual_tokens
    return _filled(spec, "max_length", max(ROOM_LEAST, min(LONGEST, room, max(lengths))))


def fill_pace(spec: TrainingSpec, lengths: Sequence[int]) -> TrainingSpec:
    """Chooses `batch_size` and `steps`; `lengths` of the examples that are learned from, as they were cut."""
    typical = math.ceil(sum(lengths) / len(lengths))
    spec = _filled(spec, "batch_size", max(1, min(BATCH, len(lengths), STEP_TOKENS // typical)))
    steps = math.ceil((spec.epochs or EPOCHS) * len(lengths) / spec.batch_size)
    least, most = (STEPS_LEAST, STEPS_MOST) if spec.epochs is None else TrainingSpec.LIMITS["steps"]
    return _filled(spec, "steps", max(int(least), min(int(most), steps)))


def room_for_text(spec: TrainingSpec, context_length: int) -> int:
    """Tokens of an example that fit behind the prefix. Raises ContextLengthExceeded where nothing would."""
    room = min(spec.max_length, context_length - spec.virtual_tokens)
    if room < ROOM_LEAST:
        raise ContextLengthExceeded(
            f"{spec.virtual_tokens} virtual tokens leave no room in a context of {context_length}",
            param="virtual_tokens",
        )
    return room


def _filled(spec: TrainingSpec, name: str, value: int) -> TrainingSpec:
    if name not in spec.unset:
        return spec
    fields: dict[str, Any] = {name: value, "unset": tuple(other for other in spec.unset if other != name)}
    return dataclasses.replace(spec, **fields)
