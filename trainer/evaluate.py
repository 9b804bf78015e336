"""How well a frozen model predicts completions, with a prefix or without."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from prefix_store.model.apply import PrefixRows
from prefix_store.model.frozen import FrozenModel
from trainer import forward, objective
from trainer.data import Example
from trainer.forward import Group


@torch.no_grad()
def nats_per_token(
    frozen: FrozenModel, rows: Callable[[int], PrefixRows] | None, batches: Iterable[Sequence[Example]]
) -> float:
    """Mean loss over every token that counts in the batches, at least one; `rows` None is the bare model."""
    nats, tokens = 0.0, 0
    for examples in batches:
        group = Group(rows(len(examples)) if rows is not None else None, examples)
        (logits,) = forward.logits(frozen, [group])
        nats += objective.loss(logits, group).item() * len(logits)
        tokens += len(logits)
    return nats / tokens
