"""From logits to tokens, for all rows of a step at once; every row has its own parameters and its own draw."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch

from server.engine.batch import Selection
from server.scheduler.messages import TokenLogprob
from server.scheduler.plan import RowResult

NUMERICS = "the prefix or the prompt makes this model's logits overflow (prefix_numerics)"


def sample(logits: torch.Tensor, selections: Rows[Selection]) -> list[RowResult]:
    """One result for each selection, in order. `logits` `[N, V]`. A row with non-finite logits fails alone."""
    logits = logits.float()
    drawing = [selection for selection in selections if selection.row.samples]
    last = [selection.first + selection.count - 1 for selection in drawing]
    tokens = dict(zip((id(s) for s in drawing), _choose(logits[last], drawing), strict=True))
    return [_result(logits, selection, tokens.get(id(selection))) for selection in selections]


def _choose(logits: torch.Tensor, selections: Rows[Selection]) -> list[int | None]:
    """Token ids; None for a row whose logits are not finite."""
    if not selections:
        return []
    best, greedy = logits.max(-1)  # NaN wins a maximum, so this looks at every logit
    chosen: list[int | None] = greedy.tolist()
    drawing = [i for i, s in enumerate(selections) if not s.row.sequence.request.params.is_greedy]
    if drawing:
        drawn = _draw(logits[drawing], [selections[i] for i in drawing])
        for index, token in zip(drawing, drawn, strict=True):
            chosen[index] = token
    for index in (~best.isfinite()).nonzero().flatten().tolist():
        chosen[index] = None
    return chosen


def _draw(logits: torch.Tensor, selections: Rows[Selection]) -> list[int]:
    """Inverse-CDF sampling: the filtered token at the row's own uniform number.

    Filters look at tokens in order of probability, the draw at tokens in order of id: rounding, which another batch
    makes differ, swaps neighbours of nearly equal probability in the one order and hardly moves the other.
    """
    params = [s.row.sequence.request.params for s in selections]
    device = logits.device
    temperature = torch.tensor([[p.temperature] for p in params], device=device)
    values, order = (logits / temperature).nan_to_num().sort(dim=-1, descending=True, stable=True)
    probabilities = values.softmax(-1)
    rank = torch.arange(values.shape[-1], device=device)
    top_k = torch.tensor([[p.top_k or values.shape[-1]] for p in params], device=device)
    top_p = torch.tensor([[p.top_p] for p in params], device=device)
    min_p = torch.tensor([[p.min_p] for p in params], device=device)
    # As in nucleus sampling (Holtzman et al. 2020), the token that crosses top_p is kept: compare the mass before it.
    before = probabilities.cumsum(-1) - probabilities
    keep = (rank < top_k) & (before < top_p) & (probabilities >= min_p * probabilities[:, :1])
    keep[:, 0] = True
    kept = torch.zeros_like(probabilities).scatter(-1, order, probabilities * keep)
    cumulative = kept.double().cumsum(-1)
    uniform = torch.tensor([[s.row.sequence.uniform()] for s in selections], dtype=torch.float64, device=device)
    index = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    # Rounding could put a draw just past the last kept token.
    last = (kept > 0).long().mul(rank).amax(-1, keepdim=True)
    drawn: list[int] = torch.minimum(index, last).flatten().tolist()
    return drawn


def _result(logits: torch.Tensor, selection: Selection, token: int | None) -> RowResult:
    row = selection.row
    scores = logits[selection.first : selection.first + selection.count]
    if (row.samples and token is None) or (len(row.scored) and not bool(scores.amax(-1).isfinite().all())):
        return RowResult(error=NUMERICS)
    params, tokens = row.sequence.request.params, row.sequence.tokens
    if params.logprobs is None:
        return RowResult(token)
    targets = [tokens[index + 1] for index in row.scored] + ([token] if token is not None else [])
    found = _logprobs(scores, targets, params.logprobs)
    return RowResult(token, found[-1] if token is not None else None, found[: len(row.scored)])


def _logprobs(logits: torch.Tensor, targets: list[int], top: int) -> list[TokenLogprob]:
    if not targets:
        return []
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor(targets, device=logits.device)[:, None]).flatten().tolist()
    values, ids = logprobs.topk(min(top, logprobs.shape[-1]))
    best = [tuple(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    return [TokenLogprob(t, lp, b) for t, lp, b in zip(targets, chosen, best, strict=True)]
