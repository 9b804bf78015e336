"""What the model says to a prompt, greedily, a few tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import DynamicCache

from prefix_store.model import apply, both
from prefix_store.model.example import Example
from prefix_store.model.frozen import FrozenModel
from prefix_store.model.rows import Rows, StackRows, stacked
from trainer.slices import Sliced

PIECE = 128  # tokens of a prompt that are read in one slice

# Reads some more tokens, and says which is likeliest next.
_Reader = Callable[[Sequence[int]], int]


def answering(frozen: FrozenModel, prefix: Rows | None, opening: Example, most: int) -> Sliced[list[int]]:
    """The likeliest token after a prompt, again and again, up to the first that ends a text, or `most`.

    `prefix`: one row; None is the bare model. Of an encoder-decoder model `opening` is what the encoder reads and the
    decoder begins with. A slice is a piece of the prompt, or a token; what was read is kept, and not run again.
    """
    read = _of_both(frozen, prefix, opening.source) if frozen.is_encoder_decoder else _of_decoder(frozen, prefix)
    token = -1
    for first in range(0, len(opening.ids), PIECE):
        token = read(opening.ids[first : first + PIECE])
        yield
    answer: list[int] = []
    while token not in frozen.end_ids:
        answer.append(token)
        if len(answer) == most:
            break
        token = read([token])
        yield
    return answer


def _of_decoder(frozen: FrozenModel, prefix: Rows | None) -> _Reader:
    assert not isinstance(prefix, StackRows)
    cache = DynamicCache()  # one made from the config would keep no more than the window of a sliding layer

    def logits(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return apply.logits(frozen, ids, mask, prefix, cache)

    return _reader(frozen, logits)


def _of_both(frozen: FrozenModel, prefix: Rows | None, source: Sequence[int]) -> _Reader:
    words, read = torch.tensor([source], device=frozen.device), both.Read.nothing()
    rows = stacked(prefix, 1, frozen.device)

    def logits(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return both.logits(frozen, words, torch.ones_like(words), ids, mask, rows, read=read)

    return _reader(frozen, logits)


def _reader(frozen: FrozenModel, logits: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> _Reader:
    count = 0

    @torch.no_grad()
    def read(some: Sequence[int]) -> int:
        nonlocal count
        count += len(some)
        ids = torch.tensor([list(some)], device=frozen.device)
        return int(logits(ids, ids.new_ones(1, count))[0, -1].argmax())

    return read
