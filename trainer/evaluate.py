"""How well a frozen model predicts completions, with a prefix or without."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from prefix_store.model import apply
from prefix_store.model.frozen import FrozenModel
from trainer.data import Batch


@torch.no_grad()
def nats_per_token(
    frozen: FrozenModel, rows: Callable[[int], apply.PrefixRows] | None, batches: Iterable[Batch]
) -> float:
    """Mean -log p over every completion token of the batches, at least one; `rows` None is the bare model."""
    nats, tokens = 0.0, 0
    for host_batch in batches:
        batch = host_batch.to(frozen.device)
        prefixes = rows(len(batch.ids)) if rows is not None else None
        nats += batch.nats(apply.logits(frozen, batch.ids, batch.real_mask, prefixes)).item()
        tokens += batch.completion_tokens
    return nats / tokens
