"""How much of a prompt's attention goes to a prefix, and what the prompt loses without each virtual token of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from prefix_store.model import apply, stored
from prefix_store.model.apply import PrefixRows
from prefix_store.model.frozen import FrozenModel
from prefix_store.prefix import PrefixManifest

# Numbers of the prefix's keys that are copied in front of the rows of one forward.
COPIED = 1 << 24
# Numbers of one forward's logits.
LOGITS = 1 << 26
# Rows of one forward: small ones keep a step of whatever else the processor does short.
ROWS = 8


@dataclass(frozen=True)
class Shares:
    """The part of attention, from 0 to 1, that falls on a prefix.

    `mean` `[L, Hq]` over the tokens of the texts, `last` `[L, Hq]` over their last tokens. `by_token` `[P]`: each
    virtual token's part of `mean`, over all layers and heads.
    """

    mean: torch.Tensor
    last: torch.Tensor
    by_token: torch.Tensor


@torch.no_grad()
def shares(frozen: FrozenModel, rows: PrefixRows, texts: Sequence[Sequence[int]]) -> Shares:
    """Of the softmax of each layer and head; `rows` is one row with KV. The model must be attached."""
    geometry, length = frozen.geometry, rows.kv.shape[4]
    size = geometry.layers, geometry.query_heads
    total, last = torch.zeros(size, device=frozen.device), torch.zeros(size, device=frozen.device)
    by_token = torch.zeros(length, device=frozen.device)

    def add(seen: apply.Seen) -> None:
        weights = seen.weights[0, :, :, :length].float()
        total[seen.layer] += weights.sum((1, 2))
        last[seen.layer] += weights[:, -1].sum(1)
        by_token.add_(weights.sum((0, 1)))

    for text in texts:
        apply.observe(frozen, torch.tensor([list(text)], device=frozen.device), rows, add)
    tokens = sum(map(len, texts))
    return Shares(total / tokens, last / len(texts), by_token / (tokens * geometry.layers * geometry.query_heads))


@torch.no_grad()
def nats_without(frozen: FrozenModel, manifest: PrefixManifest, kv: torch.Tensor, text: Sequence[int]) -> torch.Tensor:
    """`[1 + P]`: -log p of a text, its first token given, with all of the prefix and without each virtual token.

    `kv` `[L, 2, Hkv, P, D]`. Costs 1 + P runs of the text. The model must be attached.
    """
    ids = torch.tensor(list(text), device=frozen.device)
    removed = torch.arange(-1, kv.shape[3], device=frozen.device)
    rows = max(1, min(ROWS, COPIED // kv[0, 0].numel(), LOGITS // (len(text) * frozen.vocabulary_size)))
    return torch.cat([_nats(frozen, stored.without(kv, manifest, part), ids) for part in removed.split(rows)])


def _nats(frozen: FrozenModel, rows: PrefixRows, ids: torch.Tensor) -> torch.Tensor:
    batch = ids.expand(len(rows.offset), -1)
    logits = apply.logits(frozen, batch, torch.ones_like(batch), rows)[:, :-1].float()
    losses = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
    return losses.view(len(batch), -1).sum(1)
