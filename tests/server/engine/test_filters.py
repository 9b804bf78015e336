from __future__ import annotations

import random

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.engine import filters
from server.scheduler.sampling_params import SamplingParams

VOCABULARY = 80


def random_logits(rows: int, seed: int = 0, spread: float = 3.0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return spread * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def by_transformers(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Probabilities `[V]` by transformers' warpers, in its own order."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    return warpers(None, logits[None])[0].softmax(-1)


def random_params(draw: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=draw.choice([0.3, 1.0, 1.7]),
        top_k=draw.choice([0, 1, 5, 30, 1000]),
        top_p=draw.choice([1.0, 0.95, 0.5, 0.05]),
        min_p=draw.choice([0.0, 0.0, 0.02, 0.4]),
    )


@pytest.mark.parametrize("head", [1, 7, 512])
@pytest.mark.parametrize("seed", range(5))
def test_filters_are_those_of_transformers(seed, head, monkeypatch):
    monkeypatch.setattr(filters, "HEAD", head)
    draw = random.Random(seed)
    params = [random_params(draw) for _ in range(40)]
    logits = random_logits(40, seed)
    found = filters.probabilities(logits, params)
    expected = torch.stack([by_transformers(row, p) for row, p in zip(logits, params, strict=True)])
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found / found.sum(-1, keepdim=True), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("asked", "near"),
    [
        ({"top_k": 5}, {"top_k": 6}),
        ({"top_p": 0.9}, {"top_p": 0.95}),
        ({"min_p": 0.1}, {"min_p": 0.05}),
        ({"temperature": 0.9}, {"temperature": 1.0}),
        ({"top_k": 5, "top_p": 0.9}, {"top_p": 0.9}),
    ],
)
def test_a_filter_a_little_off_is_seen(asked, near):
    logits = random_logits(20)
    found = filters.probabilities(logits, [SamplingParams(**near)] * 20)
    expected = torch.stack([by_transformers(row, SamplingParams(**asked)) for row in logits])
    assert not torch.allclose(found / found.sum(-1, keepdim=True), expected, atol=1e-3)


def test_top_p_is_a_part_of_what_top_k_leaves():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    # .4 is more than half of the .7 that top_k leaves, and less than half of all
    both, one = SamplingParams(top_k=2, top_p=0.5), SamplingParams(top_p=0.5)
    assert filters.probabilities(logits, [both]).count_nonzero() == 1
    assert filters.probabilities(logits, [one]).count_nonzero() == 2


def test_equals_are_kept_or_taken_away_together():
    found = filters.probabilities(torch.tensor([[1.0, 2.0, 2.0, 0.0]]), [SamplingParams(top_k=1)])
    assert (found > 0).tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("seed", range(10))
def test_a_row_is_filtered_the_same_in_any_batch(seed):
    draw = random.Random(seed)
    params = [random_params(draw) for _ in range(12)]
    # flat rows need more than the head, peaked ones do not
    logits = torch.cat([random_logits(6, seed, 0.1, 3000), random_logits(6, seed, 5.0, 3000)])
    together = filters.probabilities(logits, params)
    for index, p in enumerate(params):
        assert torch.equal(together[index], filters.probabilities(logits[index : index + 1], [p])[0])


def test_a_row_in_which_nothing_may_come_is_a_number_still():
    logits = torch.full((2, 4), -torch.inf)
    found = filters.probabilities(logits, [SamplingParams(), SamplingParams(top_k=2, top_p=0.5, temperature=0.001)])
    assert found.tolist() == [[0.25] * 4] * 2


@pytest.mark.parametrize("head", [1, 3, 8, 200])
@pytest.mark.parametrize("seed", range(8))
def test_what_is_found_without_a_look_at_it_is_the_same(monkeypatch, head, seed):
    monkeypatch.setattr(filters, "HEAD", head)
    generator, draw = torch.Generator().manual_seed(seed), random.Random(seed)
    found = (4 * torch.randn(6, 100, generator=generator)).softmax(-1)
    params = [
        SamplingParams(top_k=draw.choice([0, 1, 5, 99, 300]), top_p=draw.choice([0.05, 0.5, 0.99, 1.0]))
        for _ in range(6)
    ]
    cut = [(i, p) for i, p in enumerate(params) if p.top_k or p.top_p < 1]
    rows, wanted = [i for i, _ in cut], [p for _, p in cut]
    assert torch.equal(filters._least(found[rows], wanted), filters._least_at_once(found[rows], wanted))
