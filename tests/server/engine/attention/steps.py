"""Packed steps of any shape, for what compares an attention backend with the plain one; on a GPU where there is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from server.engine import attention
from server.engine.attention import BACKENDS
from server.engine.attention.work import WorkItem, work_items
from server.scheduler.messages import GenerationRequest, PrefixPayload
from server.scheduler.plan import Row
from server.scheduler.residency import Resident
from server.scheduler.sampling_params import SamplingParams
from server.scheduler.sequence import Sequence
from server.scheduler.slots import Extent

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Seen: 6e-7 of the largest number, and 0.010 in bfloat16, where weights are rounded before they meet values.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.03}
PREFIXES = (1, 20, 70)
REACH = 9


@dataclass
class Step:
    """A packed step over a pool that is NaN wherever no row may look."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    items: list[WorkItem]
    options: dict[str, Any]

    def by(self, backend: str, items: list[WorkItem] | None = None) -> torch.Tensor:
        lines = torch.tensor([item.as_tuple() for item in items or self.items])
        work = lines.to(attention.lists_device(backend, DEVICE))
        return BACKENDS[backend](self.query, self.keys, self.values, work, **self.options)

    def difference(self, got: torch.Tensor) -> float:
        """From the plain backend, against the largest number."""
        expected = self.by("plain").float()
        worst = (got.float() - expected).abs().max() / expected.abs().max().clamp_min(1)
        return float(worst.nan_to_num(torch.inf))


def make_step(
    rows: list[tuple[int, int, int | None]],
    *,
    kv_heads: int = 2,
    group: int = 2,
    size: int = 16,
    dtype: torch.dtype = torch.float32,
    window: int = 0,
    softcap: float = 0.0,
    slides: bool = True,
    relative: bool = False,
) -> Step:
    """Rows that run `count` tokens from `start` on behind a prefix of `PREFIXES`, each `(start, count, prefix)`."""
    residents, free = [], 3
    for index, length in enumerate(PREFIXES):
        resident = Resident(PrefixPayload(f"{index}", length, length, slides, None), Extent(free, length))
        residents.append(resident)
        free += length + 2
    packed = []
    for start, count, prefix in sorted(rows, key=lambda row: -1 if row[2] is None else row[2]):
        request = GenerationRequest("r", "t", (1,) * (start + count), SamplingParams())
        own, resident = Extent(free, start + count), None if prefix is None else residents[prefix]
        packed.append(Row(Sequence(request, 0, extent=own, resident=resident), start, count))
        free += own.size + 2
    draws = torch.Generator().manual_seed(len(rows) + size)
    tokens, heads = sum(row.count for row in packed), kv_heads * group
    # as a model hands it over: heads first
    query = torch.randn(heads, tokens, size, generator=draws).to(DEVICE, dtype).transpose(0, 1)
    keys, values = (torch.full((free, kv_heads, size), torch.nan) for _ in range(2))
    for extent in [resident.extent for resident in residents] + [row.sequence.extent for row in packed]:
        for pool in (keys, values):
            pool[extent.start : extent.end] = torch.randn(extent.size, kv_heads, size, generator=draws)
    bias = 3 * torch.randn(heads, 2 * REACH + 1, generator=draws).to(DEVICE) if relative else None
    options = {"window": window, "scale": size**-0.5, "softcap": softcap, "bias": bias}
    items = work_items(packed, window or None, relative=relative)
    return Step(query, keys.to(DEVICE, dtype), values.to(DEVICE, dtype), items, options)
