"""How much a prefix weighs in what attention gives, against the length of what stands before a token.

Prefix-Tuning+ (arXiv 2506.13674) holds against a prefix within the softmax that a long input takes its weight away, and
a long prefix the input's. For keys and values the weight is their share of the softmax; a memory has no share, so for
it the norm of what it adds is set against the norm of what the heads give.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from prefix_store.model import apply, prompt, stored
from prefix_store.model.frozen import FrozenModel
from prefix_store.prefix import PrefixManifest
from prefix_store.tensors import PrefixTensors

LENGTHS = (8, 16, 32, 64, 128, 256, 384)
TEXTS = 4


@torch.no_grad()
def of(
    frozen: FrozenModel, manifest: PrefixManifest, tensors: PrefixTensors, inputs: Sequence[dict[str, Any]]
) -> dict[str, float]:
    """By number of tokens: the weight at the last of them, from 0 to 1, mean over layers, heads and texts."""
    frozen = apply.attach(frozen)
    ids = prompt.encode(frozen.tokenizer, " ".join(row["prompt"] for row in inputs))
    rows = stored.rows_of(frozen, manifest, tensors, stored.kv_of(frozen, manifest, tensors))
    found = {}
    for length in LENGTHS:
        weights: list[float] = []

        def note(seen: apply.Seen, weights: list[float] = weights) -> None:
            weights.append(_weight(seen, rows.kv.shape[4]))

        for text in range(TEXTS):
            start = text * (len(ids) - LENGTHS[-1]) // TEXTS
            apply.observe(frozen, torch.tensor([ids[start : start + length]]), rows, note)
        found[str(length)] = sum(weights) / len(weights)
    return found


def _weight(seen: apply.Seen, virtual_tokens: int) -> float:
    if virtual_tokens:
        return float(seen.weights[0, :, -1, :virtual_tokens].sum(1).mean())
    assert seen.recalled is not None
    added, own = (part[0, :, -1].norm(dim=1) for part in (seen.recalled, seen.output))
    return float((added / (added + own)).mean())
