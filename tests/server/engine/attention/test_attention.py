"""The backends against attention written out over the whole row: concatenate, mask, softmax."""

from __future__ import annotations

import random

import pytest
import torch

from server.engine.attention import BACKENDS
from server.engine.attention.work import Mask, Part, WorkItem, work_items
from server.scheduler.messages import GenerationRequest, PrefixPayload
from server.scheduler.plan import Row
from server.scheduler.residency import Resident
from server.scheduler.sampling_params import SamplingParams
from server.scheduler.sequence import Sequence
from server.scheduler.slots import Extent

SLOTS, SIZE = 400, 16


def make_rows(draw: random.Random, slides: bool) -> list[Row]:
    """Rows with and without prefixes over disjoint random extents, sorted as a batch sorts them."""
    starts = iter(range(0, SLOTS, 40))
    residents = [
        Resident(PrefixPayload(f"{i}", n, n, slides, None), Extent(next(starts), n)) for i, n in enumerate([3, 30])
    ]
    rows = []
    for _ in range(6):
        start, count = draw.choice([0, 5, 20]), draw.choice([1, 1, 4, 15])
        request = GenerationRequest("r", "t", (1,) * (start + count), SamplingParams())
        sequence = Sequence(request, 0, extent=Extent(next(starts), 40), resident=draw.choice([None, *residents]))
        rows.append(Row(sequence, start, count))
    return sorted(rows, key=lambda row: row.sequence.resident.extent.start if row.sequence.resident else -1)


def written_out(rows, query, keys, values, window, slides, scale, softcap) -> torch.Tensor:
    outputs, q = [], 0
    group = query.shape[1] // keys.shape[1]
    for row in rows:
        own, resident = row.sequence.extent, row.sequence.resident
        prefix = list(range(resident.extent.start, resident.extent.end)) if resident else []
        for index in range(row.start, row.start + row.count):
            slots = prefix + list(range(own.start, own.start + index + 1))
            k, v = keys[slots].repeat_interleave(group, 1), values[slots].repeat_interleave(group, 1)
            scores = torch.einsum("hd,mhd->hm", query[q], k) * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            distance = len(prefix) + index - torch.arange(len(slots))
            if window:
                hidden = distance >= window
                if not slides:
                    hidden[: len(prefix)] = False
                scores[:, hidden] = -torch.inf
            outputs.append(torch.einsum("hm,mhd->hd", scores.softmax(-1), v))
            q += 1
    return torch.stack(outputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize(("window", "slides"), [(0, True), (7, True), (7, False), (25, True)])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_equals_attention_written_out(backend, heads, window, slides, softcap):
    for seed in range(6):
        draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        rows = make_rows(draw, slides)
        total = sum(row.count for row in rows)
        query = torch.randn(total, heads[0], SIZE, generator=generator)
        keys, values = (torch.randn(SLOTS, heads[1], SIZE, generator=generator) for _ in range(2))
        work = torch.tensor([item.as_tuple() for item in work_items(rows, window or None)])
        got = BACKENDS[backend](query, keys, values, work, window=window, scale=0.3, softcap=softcap)
        expected = written_out(rows, query, keys, values, window, slides, 0.3, softcap)
        assert float((got - expected).abs().max()) < 2e-6


def test_rows_that_share_a_prefix_read_it_once():
    resident = Resident(PrefixPayload("p", 9, 9, True, None), Extent(0, 9))
    rows = []
    for index in range(3):
        request = GenerationRequest("r", "t", (1,) * 6, SamplingParams())
        rows.append(Row(Sequence(request, 0, extent=Extent(20 + 10 * index, 10), resident=resident), 5, 1))
    prefix_items = [item for item in work_items(rows, None) if item.part is Part.PREFIX]
    assert prefix_items == [WorkItem(Part.PREFIX, Mask.FULL, 0, 3, 0, 9, 14, 0)]


def test_a_prefix_out_of_the_window_is_not_read_at_all():
    resident = Resident(PrefixPayload("p", 4, 4, True, None), Extent(0, 4))
    request = GenerationRequest("r", "t", (1,) * 20, SamplingParams())
    row = Row(Sequence(request, 0, extent=Extent(20, 30), resident=resident), 12, 1)
    assert [item.part for item in work_items([row], 8)] == [Part.OWN]
