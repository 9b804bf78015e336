"""The backends against attention written out over the whole row: concatenate, mask, softmax."""

from __future__ import annotations

import random

import pytest
import torch

from prefix_store.geometry import Stack
from server.engine.attention import BACKENDS
from server.engine.attention.work import Mask, Part, WorkItem, cross_items, encoder_items, work_items
from server.scheduler.messages import GenerationRequest, PrefixPayload
from server.scheduler.plan import Row
from server.scheduler.residency import Resident
from server.scheduler.sampling_params import SamplingParams
from server.scheduler.sequence import Sequence
from server.scheduler.slots import Extent
from tests.parity.harness import backends

SLOTS, SIZE, REACH = 400, 16, 9


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


@pytest.mark.parametrize("backend", backends())
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


@pytest.mark.parametrize("backend", backends())
def test_relative_positions_add_their_bias_to_scores(backend):
    """Written out by distance, virtual tokens being places like all others; a table that is off by one fails."""
    for seed in range(6):
        draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        rows = make_rows(draw, slides=True)
        query = torch.randn(sum(row.count for row in rows), 4, SIZE, generator=generator)
        keys, values = (torch.randn(SLOTS, 4, SIZE, generator=generator) for _ in range(2))
        bias = 3 * torch.randn(4, 2 * REACH + 1, generator=generator)
        work = torch.tensor([item.as_tuple() for item in work_items(rows, None, relative=True)])
        options = {"window": 0, "scale": 0.3, "softcap": 0.0}
        got = BACKENDS[backend](query, keys, values, work, **options, bias=bias)
        expected = written_out_by_distance(rows, query, keys, values, bias)
        assert float((got - expected).abs().max()) < 4e-6
        off = BACKENDS[backend](query, keys, values, work, **options, bias=bias.roll(1, 1))
        assert float((off - expected).abs().max()) > 1e-2


def written_out_by_distance(rows, query, keys, values, bias) -> torch.Tensor:
    outputs, q = [], 0
    for row in rows:
        own, resident = row.sequence.extent, row.sequence.resident
        prefix = list(range(resident.extent.start, resident.extent.end)) if resident else []
        for index in range(row.start, row.start + row.count):
            slots = prefix + list(range(own.start, own.start + index + 1))
            scores = torch.einsum("hd,mhd->hm", query[q], keys[slots]) * 0.3
            for place in range(len(slots)):
                behind = min(len(slots) - 1 - place, REACH)
                scores[:, place] += bias[:, REACH - behind]
            outputs.append(torch.einsum("hm,mhd->hd", scores.softmax(-1), values[slots]))
            q += 1
    return torch.stack(outputs)


def test_rows_that_see_a_prefix_from_places_of_their_own_read_it_each():
    resident = Resident(PrefixPayload("p", 9, 9, True, None), Extent(0, 9))
    requests = [GenerationRequest("r", "t", (1,) * length, SamplingParams()) for length in (6, 8)]
    rows = [
        Row(Sequence(request, 0, extent=Extent(20 + 10 * i, 10), resident=resident), len(request.prompt_ids) - 1, 1)
        for i, request in enumerate(requests)
    ]
    items = [item for item in work_items(rows, None, relative=True) if item.part is Part.PREFIX]
    assert [(item.q_lo, item.q_hi, item.q_pos) for item in items] == [(0, 1, 14), (1, 2, 16)]


def test_sources_are_seen_whole_behind_the_prefixes_of_their_stacks():
    resident = Resident(PrefixPayload("p", 4, 4, True, None, stacks=tuple(Stack)), Extent(0, 8))
    request = GenerationRequest("r", "t", (1,), SamplingParams(), source_ids=(5,) * 6)
    rows = [
        Row(Sequence(request, 0, extent=Extent(20 + i, 1), source=Extent(40 + 10 * i, 6), resident=resident), 0, 1)
        for i in range(2)
    ]
    own = [WorkItem(Part.OWN, Mask.FULL, i, i + 1, 40 + 10 * i, 46 + 10 * i, 0, 0) for i in range(2)]
    assert cross_items(rows) == [*own, WorkItem(Part.PREFIX, Mask.FULL, 0, 2, 4, 8, 0, 0)]
    own = [WorkItem(Part.OWN, Mask.FULL, 6 * i, 6 * i + 6, 40 + 10 * i, 46 + 10 * i, 0, 0) for i in range(2)]
    assert encoder_items(rows) == [*own, WorkItem(Part.PREFIX, Mask.FULL, 0, 12, 0, 4, 4, 0)]
    each = [WorkItem(Part.PREFIX, Mask.FULL, 6 * i, 6 * i + 6, 0, 4, 4, 0) for i in range(2)]
    assert encoder_items(rows, relative=True) == [*own, *each]


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
