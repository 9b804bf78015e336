"""Examples to train on, drawn at random: what they say changes no timing."""

from __future__ import annotations

import torch

from trainer.data import Example


def batch(
    vocabulary: int, rows: int, tokens: int, seed: int, *, shortest: int | None = None, prompt: int = 1
) -> list[Example]:
    """So many examples of `tokens` tokens, or of `shortest` to `tokens`, of which the first `prompt` do not count."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest or tokens, tokens + 1, (rows,), generator=generator).tolist()
    return [
        Example(tuple(torch.randint(vocabulary, (length,), generator=generator).tolist()), prompt) for length in lengths
    ]
