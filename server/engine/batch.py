"""A plan as tensors: the rows of a step packed one after another, without padding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from server.engine.attention.memory import MemoryItem, memory_items
from server.engine.attention.work import FIELDS, WorkItem, cross_items, encoder_items, work_items
from server.engine.transit import bring
from server.scheduler.plan import Row, StepPlan


@dataclass(frozen=True)
class Selection:
    """Where a plan's row finds its logits: `scored` prompt positions first, then the sampled one if it samples."""

    row: Row
    first: int
    count: int

    @property
    def last(self) -> int:
        """Where the logits of the next token are."""
        return self.first + self.count - 1


@dataclass(frozen=True)
class Unread:
    """Tokens `[M]` on the device that the host has not read, one for each of a batch's logits."""

    tokens: torch.Tensor
    selections: Sequence[Selection]

    @cached_property
    def places(self) -> Mapping[int, int]:
        """Which is whose, by the `id` of the sequence."""
        return {id(s.row.sequence): s.last for s in self.selections if s.count}


@dataclass(frozen=True)
class Sources:
    """What an encoder-decoder model reads in a step: `token_ids` and `positions` `[1, S]`, none where no row begins.

    `slots` `[S]`: where the sources' keys and values go, the encoder's own and those that the cross-attention makes of
    its output. `prompts`: soft prompts `[P, E]` that stand in the place of tokens, each with its first place. `work` is
    the encoder's, `cross` the cross-attention's, of all rows.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    prompts: tuple[tuple[int, torch.Tensor], ...]
    work: torch.Tensor
    cross: torch.Tensor

    def on(self, device: torch.device, lists: torch.device) -> Sources:
        """See `Batch.on`."""
        return replace(
            self,
            token_ids=bring(self.token_ids, device),
            positions=bring(self.positions, device),
            slots=bring(self.slots, device),
            work=bring(self.work, lists),
            cross=bring(self.cross, lists),
        )


@dataclass(frozen=True)
class Batch:
    """`token_ids` and `positions` `[1, T]`, `slots` `[T]`, `selected` `[N]` packed indices whose logits are wanted.

    `work` and `memories`: see `StackStep`. `sources`: None for a decoder-only model. `token_ids` are
    places in `unread` where there is that: tokens `[M]` that the step before gave, on the device.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    work: dict[int, torch.Tensor]
    memories: torch.Tensor | None
    selected: torch.Tensor
    selections: tuple[Selection, ...]
    sources: Sources | None = None
    unread: torch.Tensor | None = None

    def on(self, device: torch.device, lists: torch.device) -> Batch:
        """The same with its tensors on the model's device, and work and memories where the backend reads them."""
        token_ids = bring(self.token_ids, device)
        return replace(
            self,
            token_ids=token_ids if self.unread is None else self.unread[token_ids],
            positions=bring(self.positions, device),
            slots=bring(self.slots, device),
            work={window: bring(lines, lists) for window, lines in self.work.items()},
            memories=bring(self.memories, lists) if self.memories is not None else None,
            selected=bring(self.selected, device),
            sources=self.sources.on(device, lists) if self.sources is not None else None,
            unread=None,
        )


def build(plan: StepPlan, windows: Iterable[int], *, relative: bool = False, unread: Unread | None = None) -> Batch:
    """Packs a plan, on the host. Rows that share a prefix become neighbours; `selections` stay in the plan's order.

    `relative`: the model's positions are relative, see `work_items`. `unread`: what the rows of a plan that was made
    ahead go on with.
    """
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
        token_ids.extend(_token_ids(row, unread))
        _pack(row, positions, slots)
    return Batch(
        token_ids=torch.tensor([token_ids]),
        positions=torch.tensor([positions]),
        slots=torch.tensor(slots),
        work={window: _lines(work_items(packed, window or None, relative=relative)) for window in windows},
        memories=_memories(packed),
        selected=torch.tensor(selected, dtype=torch.long),
        selections=tuple(selections[id(row.sequence)] for row in plan.rows),
        sources=_sources(packed, relative) if packed[0].sequence.source is not None else None,
        unread=unread.tokens if unread is not None else None,
    )


def behind(batch: Batch, rows: Sequence[Row], unread: Unread) -> Batch | None:
    """What `build` makes of the next token of each of a batch's rows, in a tenth of the time.

    None where more is different than that, or where a window slides over what they see.
    """
    is_one_each = batch.token_ids.numel() == len(rows) == len(batch.selections)
    is_last = batch.selections is unread.selections
    is_same = is_last and is_one_each and [s.row.sequence for s in batch.selections] == [row.sequence for row in rows]
    if not is_same or batch.sources is not None or batch.work.keys() != {0}:
        return None
    places = torch.tensor([s.first for s in batch.selections])
    slots = torch.tensor([row.sequence.extent.start + row.start for row in rows if row.sequence.extent is not None])
    if not torch.equal(slots, batch.slots[places] + 1):
        return None  # a row has moved
    lines = batch.work[0].clone()
    lines[:, FIELDS.index("q_pos")] += 1
    lines[: len(rows), FIELDS.index("kv_hi")] += 1  # their own keys stand first
    return replace(
        batch,
        token_ids=torch.arange(len(rows))[None],
        positions=batch.positions + 1,
        slots=batch.slots + 1,
        work={0: lines},
        selections=tuple(Selection(row, s.first, 1) for s, row in zip(batch.selections, rows, strict=True)),
        unread=unread.tokens,
    )


def _sources(packed: Sequence[Row], relative: bool) -> Sources:
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    prompts = []
    beginning = [row for row in packed if row.encodes]
    for row in beginning:
        request, source = row.sequence.request, row.sequence.source
        assert source is not None
        if request.prefix is not None and request.prefix.source_tokens:
            prompts.append((len(token_ids), request.prefix.tensor))
            token_ids.extend([0] * request.prefix.source_tokens)
        token_ids.extend(request.source_ids)
        positions.extend(range(source.size))
        slots.extend(range(source.start, source.end))
    return Sources(
        token_ids=torch.tensor([token_ids]),
        positions=torch.tensor([positions]),
        slots=torch.tensor(slots, dtype=torch.long),
        prompts=tuple(prompts),
        work=_lines(encoder_items(beginning, relative=relative)),
        cross=_lines(cross_items(packed)),
    )


def _token_ids(row: Row, unread: Unread | None) -> list[int]:
    return row.sequence.tokens[row.start : row.end] if unread is None else [unread.places[id(row.sequence)]]


def _pack(row: Row, positions: list[int], slots: list[int]) -> None:
    sequence = row.sequence
    end = row.end
    payload = sequence.request.prefix
    offset = payload.position_offset if payload is not None else 0
    assert sequence.extent is not None
    positions.extend(range(offset + row.start, offset + end))
    slots.extend(range(sequence.extent.start + row.start, sequence.extent.start + end))


def _wanted(row: Row, first: int) -> list[int]:
    """Packed indices of a row whose logits are wanted; `first` is the packed index of its first token."""
    wanted = [first + index - row.start for index in row.scored]
    return [*wanted, first + row.count - 1] if row.samples else wanted


def _lines(items: Sequence[WorkItem] | Sequence[MemoryItem]) -> torch.Tensor:
    return torch.tensor([item.as_tuple() for item in items])


def _memories(rows: Sequence[Row]) -> torch.Tensor | None:
    items = memory_items(rows)
    return _lines(items) if items else None


def _prefix_start(row: Row) -> int:
    resident = row.sequence.resident
    return resident.extent.start if resident is not None else -1
