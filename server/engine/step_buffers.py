"""A step's inputs at addresses and in shapes that stay: what a captured step reads, and all that changes between two.

A step is padded to its bucket. A token of the padding is nobody's: no line of work names it, so it attends to nothing,
and its key and its value go into the pool's slot that is nobody's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

import torch

from server.engine.attention.work import FIELDS
from server.engine.batch import Batch
from server.engine.transit import Mark

MEMORY_FIELDS = 4


@dataclass(frozen=True)
class Bucket:
    """How large a step may be: `tokens`, and `rows` of them that want logits, with as many memories if any row has one.

    A row has at most two lines of work: of its own keys, and of its prefix's.
    """

    tokens: int
    rows: int
    has_memories: bool

    def holds(self, batch: Batch) -> bool:
        """Whether a step fits in."""
        lines = max(len(work) for work in batch.work.values())
        fits = batch.token_ids.numel() <= self.tokens and max(len(batch.selected), -(-lines // 2)) <= self.rows
        return fits and (self.has_memories or batch.memories is None)


class StepBuffers:
    """The inputs of one bucket's steps: `batch`, whose tensors are parts of one, so one copy brings all of a step."""

    def __init__(self, bucket: Bucket, windows: Iterable[int], spare_slot: int, device: torch.device) -> None:
        self.bucket = bucket
        self._spare_slot = spare_slot
        self._windows = tuple(windows)
        shapes = self._shapes()
        size = sum(map(prod, shapes))
        pinned = device.type == "cuda"
        # Two by turns: a copy may still be on its way when the next step is written. Each with what it waits for.
        hosts = [torch.zeros(size, dtype=torch.long, pin_memory=pinned) for _ in range(2)]
        self._device = torch.zeros(size, dtype=torch.long, device=device)
        self._hosts = [(host, self._batch(_split(host, shapes)), Mark(device)) for host in hosts]
        self.batch = self._batch(_split(self._device, shapes))
        self.batch.slots.fill_(spare_slot)

    def fill(self, batch: Batch) -> None:
        """Takes over a step that lies on the host and that the bucket holds; waits only for an older copy."""
        (host, target, copied), other = self._hosts
        copied.wait()
        host.zero_()
        target.slots.fill_(self._spare_slot)
        tokens = batch.token_ids.shape[1]
        target.token_ids[:, :tokens] = batch.token_ids
        target.positions[:, :tokens] = batch.positions
        target.slots[:tokens] = batch.slots
        target.selected[: len(batch.selected)] = batch.selected
        for window, lines in batch.work.items():
            target.work[window][: len(lines)] = lines
        if batch.memories is not None:
            assert target.memories is not None
            target.memories[: len(batch.memories)] = batch.memories
        self._device.copy_(host, non_blocking=True)
        self._hosts = [other, (host, target, Mark(self._device.device))]
        if batch.unread is not None:
            token_ids = self.batch.token_ids[:, :tokens]
            token_ids.copy_(batch.unread[token_ids])

    def _shapes(self) -> list[tuple[int, ...]]:
        tokens, rows = self.bucket.tokens, self.bucket.rows
        work = [(2 * rows, len(FIELDS)) for _ in self._windows]
        memories = [(rows, MEMORY_FIELDS)] if self.bucket.has_memories else []
        return [(1, tokens), (1, tokens), (tokens,), (rows,), *work, *memories]

    def _batch(self, parts: Iterator[torch.Tensor]) -> Batch:
        return Batch(
            token_ids=next(parts),
            positions=next(parts),
            slots=next(parts),
            selected=next(parts),
            work={window: next(parts) for window in self._windows},
            memories=next(parts, None),
            selections=(),
        )


def _split(flat: torch.Tensor, shapes: list[tuple[int, ...]]) -> Iterator[torch.Tensor]:
    pieces = flat.split([prod(shape) for shape in shapes])
    return (piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True))
