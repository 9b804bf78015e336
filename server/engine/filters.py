"""Which tokens a row may draw: temperature, then top_k, top_p and min_p, each of which is a least probability."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch

from server.engine.transit import bring
from server.scheduler.sampling_params import SamplingParams

# Sorting a whole vocabulary takes longer than all the rest, and the likeliest few are nearly always enough.
HEAD = 512


def probabilities(logits: torch.Tensor, params: Rows[SamplingParams]) -> torch.Tensor:
    """Probabilities `[N, V]` at each row's temperature, 0 for what its filters take away; the rest is not rescaled.

    As in transformers and vLLM, top_p is a part of what top_k leaves. A token as likely as the last that is kept is
    kept too, so no order among equals, which could turn on the batch, decides.
    """
    largest = torch.finfo(logits.dtype).max
    # clamped, a row in which nothing may come is uniform, not NaN
    found = (logits / _column([p.temperature for p in params], logits)).clamp_(-largest, largest).softmax(-1)
    least = torch.zeros(len(params), 1, device=logits.device)
    cut = [i for i, p in enumerate(params) if p.top_k > 0 or p.top_p < 1]
    if cut:
        rows = bring(torch.tensor(cut), logits.device)
        find = _least if logits.device.type == "cpu" else _least_at_once
        least[rows] = find(found[rows], [params[i] for i in cut])
    if any(p.min_p > 0 for p in params):
        least = least.maximum(_column([p.min_p for p in params], logits) * found.amax(-1, keepdim=True))
    elif not cut:
        return found
    return found.where(found >= least, 0.0)


def _least(found: torch.Tensor, params: Rows[SamplingParams]) -> torch.Tensor:
    """The least probability `[N, 1]` that top_k and top_p keep; every row is sorted as far as it needs."""
    vocabulary = found.shape[-1]
    least, is_certain = _cut(found.topk(min(HEAD, vocabulary)).values, params, vocabulary)
    rest = (~is_certain).flatten().nonzero().flatten().tolist()
    if rest:
        least[rest], _ = _cut(found[rest].sort(descending=True).values, [params[i] for i in rest], vocabulary)
    return least


def _least_at_once(found: torch.Tensor, params: Rows[SamplingParams]) -> torch.Tensor:
    """The same without a look at how far the rows have to be sorted, for which the host would wait for the device."""
    vocabulary = found.shape[-1]
    is_enough = all(0 < p.top_k <= HEAD for p in params)
    ranked = found.topk(min(HEAD, vocabulary)).values if is_enough else found.sort(descending=True).values
    return _cut(ranked, params, vocabulary)[0]


def _cut(ranked: torch.Tensor, params: Rows[SamplingParams], vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of probabilities given likeliest first, the last kept, and whether more could not change it; both `[N, 1]`."""
    size = ranked.shape[-1]
    top_k = _column([min(p.top_k or vocabulary, vocabulary) for p in params], ranked, torch.long)
    top_p = _column([p.top_p if p.top_p < 1 else torch.inf for p in params], ranked)
    mass = ranked.cumsum(-1)
    total = mass.gather(-1, top_k.clamp(max=size) - 1).where(top_k < vocabulary, 1.0)
    # As in nucleus sampling (Holtzman et al. 2020), the token that crosses top_p is kept: compare the mass before it.
    kept = (torch.arange(size, device=ranked.device) < top_k) & (mass - ranked < top_p * total)
    count = kept.sum(-1, keepdim=True).clamp(min=1)
    is_certain = (top_k <= size) | ((top_k == vocabulary) & (count < size))
    return ranked.gather(-1, count - 1), is_certain


def _column(numbers: list[float] | list[int], like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return bring(torch.tensor(numbers, dtype=dtype or like.dtype), like.device)[:, None]
