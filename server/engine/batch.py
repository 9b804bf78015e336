"""A plan as tensors: the rows of a step packed one after another, without padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from server.engine.attention.memory import memory_items
from server.engine.attention.work import work_items
from server.scheduler.plan import Row, StepPlan


@dataclass(frozen=True)
class Selection:
    """Where a plan's row finds its logits: `scored` prompt positions first, then the sampled one if it samples."""

    row: Row
    first: int
    count: int


@dataclass(frozen=True)
class Batch:
    """`token_ids` and `positions` `[1, T]`, `slots` `[T]`, `selected` `[N]` packed indices whose logits are wanted.

    `work` and `memories`: see `StepContext`.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    work: dict[int, torch.Tensor]
    memories: torch.Tensor | None
    selected: torch.Tensor
    selections: tuple[Selection, ...]


def build(plan: StepPlan, windows: Iterable[int], device: torch.device) -> Batch:
    """Packs a plan. Rows that share a prefix become neighbours; `selections` stay in the plan's order."""
    packed = sorted(plan.rows, key=_prefix_start)
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    selected: list[int] = []
    selections: dict[int, Selection] = {}
    for row in packed:
        wanted = _wanted(row, len(token_ids))
        selections[id(row.sequence)] = Selection(row, len(selected), len(wanted))
        selected.extend(wanted)
        _pack(row, token_ids, positions, slots)
    return Batch(
        token_ids=torch.tensor([token_ids], device=device),
        positions=torch.tensor([positions], device=device),
        slots=torch.tensor(slots, device=device),
        work={window: _work(packed, window) for window in windows},
        memories=_memories(packed),
        selected=torch.tensor(selected, dtype=torch.long, device=device),
        selections=tuple(selections[id(row.sequence)] for row in plan.rows),
    )


def _pack(row: Row, token_ids: list[int], positions: list[int], slots: list[int]) -> None:
    sequence = row.sequence
    end = row.start + row.count
    payload = sequence.request.prefix
    offset = payload.position_offset if payload is not None else 0
    assert sequence.extent is not None
    token_ids.extend(sequence.tokens[row.start : end])
    positions.extend(range(offset + row.start, offset + end))
    slots.extend(range(sequence.extent.start + row.start, sequence.extent.start + end))


def _wanted(row: Row, first: int) -> list[int]:
    """Packed indices of a row whose logits are wanted; `first` is the packed index of its first token."""
    wanted = [first + index - row.start for index in row.scored]
    return [*wanted, first + row.count - 1] if row.samples else wanted


def _work(rows: Sequence[Row], window: int) -> torch.Tensor:
    return torch.tensor([item.as_tuple() for item in work_items(rows, window or None)])


def _memories(rows: Sequence[Row]) -> torch.Tensor | None:
    items = memory_items(rows)
    return torch.tensor([item.as_tuple() for item in items]) if items else None


def _prefix_start(row: Row) -> int:
    resident = row.sequence.resident
    return resident.extent.start if resident is not None else -1
