"""How well a frozen model predicts completions, with a prefix or without, in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from prefix_store.model.apply import PrefixRows
from prefix_store.model.frozen import FrozenModel
from trainer import forward
from trainer.data import Example
from trainer.forward import Group


@torch.no_grad()
def nats_per_token(
    frozen: FrozenModel, rows: Callable[[int], PrefixRows] | None, batches: Iterable[Sequence[Example]]
) -> float:
    """Mean loss over every token that counts in the batches, at least one; `rows` None is the bare model."""
    total, tokens = 0.0, 0
    for examples in batches:
        (found,) = forward.losses(frozen, [Group(rows(len(examples)) if rows is not None else None, examples)])
        total += found.item()
        tokens += sum(len(example.targets) for example in examples)
    return total / tokens
