"""The prefixes of a batch: one for each of its rows, padded to the longest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from prefix_store.geometry import Stack
from prefix_store.model.memory import Memory
from prefix_store.prefix import Window


@dataclass(frozen=True)
class PrefixRows:
    """One KV prefix for each row of a batch, padded on the right to the longest, and its memory where it has one.

    `kv` `[B, L, 2, Hkv, P, D]`, keys as they stand in a cache. `valid` `[B, P]`: false on padding. `offset` `[B]`: the
    position of the row's first real token. `slides` `[B]`: whether a sliding window may leave the prefix behind.
    `memories`: one for each row, or none at all. `lengths` `[B]`: `back`, where that is not what `valid` counts because
    slots in its midst are left out.
    """

    kv: torch.Tensor
    valid: torch.Tensor
    offset: torch.Tensor
    slides: torch.Tensor
    memories: tuple[Memory | None, ...] = ()
    lengths: torch.Tensor | None = None

    @classmethod
    def stack(
        cls,
        kvs: Sequence[torch.Tensor],
        offsets: Sequence[int],
        windows: Sequence[Window],
        memories: Sequence[Memory | None] = (),
    ) -> PrefixRows:
        """Rows of prefixes of any lengths, each `[L, 2, Hkv, P, D]`.

        A row without a KV prefix, be it that it has a memory or nothing, has P = 0 and offset 0.
        """
        device, longest = kvs[0].device, max(kv.shape[3] for kv in kvs)
        lengths = torch.tensor([kv.shape[3] for kv in kvs], device=device)
        padded = [functional.pad(kv, (0, 0, 0, longest - kv.shape[3])) for kv in kvs]
        return cls(
            kv=torch.stack(padded),
            valid=torch.arange(longest, device=device) < lengths[:, None],
            offset=torch.tensor(offsets, device=device),
            slides=torch.tensor([window is Window.SLIDES for window in windows], device=device),
            memories=tuple(memories),
        )

    @classmethod
    def shared(cls, kv: torch.Tensor, rows: int, offset: int, window: Window) -> PrefixRows:
        """The same prefix `[L, 2, Hkv, P, D]` for every row, without a copy."""
        device = kv.device
        return cls(
            kv=kv.expand(rows, *kv.shape),
            valid=torch.ones(rows, kv.shape[3], dtype=torch.bool, device=device),
            offset=torch.full((rows,), offset, device=device),
            slides=torch.full((rows,), window is Window.SLIDES, device=device),
        )

    @property
    def back(self) -> torch.Tensor:
        """`[B]`: how far before its first real token each row's prefix begins."""
        return self.valid.sum(1) if self.lengths is None else self.lengths

    def visible(self, real_index: torch.Tensor, sliding_window: int | None) -> torch.Tensor:
        """`[B, T, P]`: which prefix slots each token sees; `real_index` `[B, T]` counts the real tokens before it.

        Slot p of a row that slides is seen by real token i iff (P + i) - p < window, as a cached token would be.
        """
        valid = self.valid[:, None, :].expand(-1, real_index.shape[1], -1)
        if sliding_window is None:
            return valid
        slots = torch.arange(valid.shape[2], device=valid.device)
        distance = (self.back[:, None] + real_index)[:, :, None] - slots
        return valid & ((distance < sliding_window) | ~self.slides[:, None, None])


@dataclass(frozen=True)
class StackRows:
    """One prefix of an encoder-decoder model for each row of a batch.

    `stacks`: keys and values by stack, each for all rows; in the stacks that are absent no row has any. `offset` `[B]`:
    the position of the decoder's first token. `embeds` `[B, P, E]`: soft prompts in front of the source's embeddings,
    padded on the left where `valid` `[B, P]` is false, so that they touch the source; None where no row has any.
    """

    stacks: Mapping[Stack, PrefixRows]
    offset: torch.Tensor
    embeds: torch.Tensor | None = None
    valid: torch.Tensor | None = None

    @classmethod
    def shared(cls, stacks: Mapping[Stack, torch.Tensor], rows: int, offset: int) -> StackRows:
        """The same keys and values, `[L, 2, H, P, D]` by stack, for every row, without a copy."""
        found = {stack: PrefixRows.shared(kv, rows, offset, Window.ALWAYS) for stack, kv in stacks.items()}
        return cls(found, next(iter(found.values())).offset)

    @classmethod
    def prompt(cls, embeds: torch.Tensor, rows: int) -> StackRows:
        """The same soft prompt `[P, E]` for every row; the decoder begins at position 0."""
        valid = torch.ones(rows, len(embeds), dtype=torch.bool, device=embeds.device)
        return cls({}, _nothing(rows, embeds.device), embeds.expand(rows, *embeds.shape), valid)

    @classmethod
    def bare(cls, rows: int, device: torch.device) -> StackRows:
        """No prefix."""
        return cls({}, _nothing(rows, device))

    @classmethod
    def joined(cls, parts: Sequence[StackRows]) -> StackRows:
        """The rows of all parts, one part after another."""
        counts = [len(part.offset) for part in parts]
        stacks = {
            stack: _joined([part.stacks.get(stack) for part in parts], counts)
            for stack in Stack
            if any(stack in part.stacks for part in parts)
        }
        return cls(stacks, torch.cat([part.offset for part in parts]), *_joined_prompts(parts, counts))


# What a batch's prefixes are; of an encoder-decoder model, `PrefixRows` are those of the decoder's own stack alone.
Rows = PrefixRows | StackRows


def stacked(rows: Rows | None, count: int, device: torch.device) -> StackRows:
    """The prefixes of `count` rows, as an encoder-decoder model takes them; None is no prefix."""
    if rows is None:
        return StackRows.bare(count, device)
    return rows if isinstance(rows, StackRows) else StackRows({Stack.SELF: rows}, rows.offset)


def _nothing(rows: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(rows, dtype=torch.long, device=device)


def _joined(parts: Sequence[PrefixRows | None], counts: Sequence[int]) -> PrefixRows:
    """Of one stack; a part without it has P = 0 there."""
    like = next(part.kv for part in parts if part is not None)
    longest = max(part.kv.shape[4] for part in parts if part is not None)
    kvs, valid = [], []
    for part, count in zip(parts, counts, strict=True):
        kv = part.kv if part is not None else like.new_zeros(count, *like.shape[1:4], 0, like.shape[5])
        seen = part.valid if part is not None else torch.zeros_like(kv[:, 0, 0, 0, :, 0], dtype=torch.bool)
        kvs.append(functional.pad(kv, (0, 0, 0, longest - kv.shape[4])))
        valid.append(functional.pad(seen, (0, longest - kv.shape[4])))
    nothing = _nothing(sum(counts), like.device)
    return PrefixRows(torch.cat(kvs), torch.cat(valid), offset=nothing, slides=nothing.bool())


def _joined_prompts(
    parts: Sequence[StackRows], counts: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    prompts = [part.embeds for part in parts if part.embeds is not None]
    if not prompts:
        return None, None
    longest = max(prompt.shape[1] for prompt in prompts)
    embeds, valid = [], []
    for part, count in zip(parts, counts, strict=True):
        own = part.embeds if part.embeds is not None else prompts[0].new_zeros(count, 0, prompts[0].shape[2])
        seen = part.valid if part.valid is not None else torch.zeros_like(own[:, :, 0], dtype=torch.bool)
        embeds.append(functional.pad(own, (0, 0, longest - own.shape[1], 0)))
        valid.append(functional.pad(seen, (longest - own.shape[1], 0)))
    return torch.cat(embeds), torch.cat(valid)
