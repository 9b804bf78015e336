"""From logits to tokens, for all rows of a step at once; every row has its own parameters and its own draw.

Where every row's token can be chosen on the device (`Sequence.is_plain`), nothing here waits for it: see `Sampled`.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import replace
from itertools import chain, islice

import torch

from prefix_store.errors import PrefixNumerics
from server.engine import filters
from server.engine.adjustments import adjust
from server.engine.batch import Selection
from server.engine.constraints import read_on
from server.engine.continuations import candidates
from server.engine.sampled import Sampled
from server.engine.transit import bring
from server.scheduler.messages import TokenLogprob
from server.scheduler.plan import RowResult
from server.scheduler.sampling_params import MAX_LOGPROBS, SamplingParams


def sample(logits: torch.Tensor, selections: Rows[Selection]) -> Sampled:
    """One result for each selection, in order. `logits` `[N, V]`.

    A row with non-finite logits, or with a grammar that cannot be followed any further, fails alone.
    """
    logits = logits.float()
    tokens = _likeliest(logits)
    # NaN wins a maximum, so this looks at every logit
    finite = logits.gather(-1, tokens[:, None]).isfinite().flatten()
    if all(s.row.sequence.is_plain for s in selections if s.count):
        _choose(tokens, logits, [s for s in selections if s.row.samples])
        return Sampled.on_device(selections, tokens, finite)
    return Sampled.known(_with_the_host(logits, tokens, finite.tolist(), selections))


def _with_the_host(
    logits: torch.Tensor, tokens: torch.Tensor, finite: list[bool], selections: Rows[Selection]
) -> list[RowResult]:
    sound = [s for s in selections if all(finite[s.first : s.first + s.count])]
    failed = read_on([s.row.sequence for s in sound if s.row.samples])
    sound = [s for s in sound if s.row.sequence not in failed]
    sampling = [s for s in sound if s.row.samples]
    beams = [s for s in sampling if s.row.sequence.width > 1]
    single = [s for s in sampling if s.row.sequence.width == 1]
    _choose(tokens, logits, single)
    chosen = tokens.tolist()
    results = dict(zip(sound, _results(logits, sound, {s: chosen[s.last] for s in single}), strict=True))
    if beams:
        found = candidates(logits[[s.last for s in beams]], [s.row.sequence for s in beams])
        results.update((s, replace(results[s], candidates=best)) for s, best in zip(beams, found, strict=True))
    return [results.get(s) or RowResult(error=failed.get(s.row.sequence) or PrefixNumerics()) for s in selections]


def _likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The first of the largest logits of each row. numpy's is ten times as fast as torch's on a CPU, and the same."""
    if logits.device.type != "cpu":
        return logits.argmax(-1)
    return torch.from_numpy(logits.numpy().argmax(-1))


def _choose(tokens: torch.Tensor, logits: torch.Tensor, selections: Rows[Selection]) -> None:
    """Puts the next token of each into its place of `tokens`, which are the likeliest: some rows have it already."""
    drawing = [s for s in selections if not _params(s).is_greedy]
    adjusted = [s for s in selections if _params(s).is_greedy and s.row.sequence.is_adjusted]
    rows = [*drawing, *adjusted]
    if rows:
        places = bring(torch.tensor([s.last for s in rows]), logits.device)
        own = logits[places]  # a copy: logprobs are of the model's own logits
        adjust(own, [s.row.sequence for s in rows])
        likeliest = own[len(drawing) :].argmax(-1)
        tokens[places] = torch.cat([_draw(own[: len(drawing)], drawing), likeliest]) if drawing else likeliest


def _draw(logits: torch.Tensor, selections: Rows[Selection]) -> torch.Tensor:
    """Inverse-CDF sampling: the filtered token at the row's own uniform number, `[N]`.

    The draw looks at tokens in order of id, not of probability: rounding, which another batch makes differ, swaps
    neighbours of nearly equal probability in the one order and hardly moves the other.
    """
    kept = filters.probabilities(logits, [_params(s) for s in selections])
    cumulative = kept.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:].contiguous()
    numbers = [[s.row.sequence.uniform(s.row.end)] for s in selections]
    uniform = bring(torch.tensor(numbers, dtype=torch.float64), logits.device)
    index = torch.searchsorted(cumulative, uniform * total, right=True)
    # Rounding could put a draw just past the last kept token, and what is no number, past all of them.
    last = torch.searchsorted(cumulative, total).clamp(max=logits.shape[-1] - 1)
    return torch.minimum(index, last).flatten()


def _results(logits: torch.Tensor, selections: Rows[Selection], tokens: dict[Selection, int]) -> list[RowResult]:
    targets = [_targets(selection, tokens.get(selection)) for selection in selections]
    positions = [s.first + i for s, wanted in zip(selections, targets, strict=True) for i in range(len(wanted))]
    tops = [_params(s).logprobs or 0 for s, wanted in zip(selections, targets, strict=True) for _ in wanted]
    scores = iter(_logprobs(logits, positions, list(chain.from_iterable(targets)), tops))
    results = []
    for selection, wanted in zip(selections, targets, strict=True):
        token, found = tokens.get(selection), list(islice(scores, len(wanted)))
        sampled = found.pop() if found and token is not None else None
        results.append(RowResult(token, sampled, found))
    return results


def _targets(selection: Selection, token: int | None) -> list[int]:
    """The tokens whose logprobs are wanted, in the order of the selection's logits."""
    if _params(selection).logprobs is None:
        return []
    prompt = [selection.row.sequence.tokens[index + 1] for index in selection.row.scored]
    return prompt if token is None else [*prompt, token]


def _logprobs(logits: torch.Tensor, positions: list[int], targets: list[int], tops: list[int]) -> list[TokenLogprob]:
    """By the bare softmax of the model's logits at each position: the target's, and the likeliest `tops`' own."""
    if not targets:
        return []
    logprobs = logits[positions].log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor(targets, device=logits.device)[:, None]).flatten().tolist()
    # always the most that may be asked for: how equals are ordered could turn on how many a neighbour wants
    values, ids = logprobs.topk(min(MAX_LOGPROBS, logprobs.shape[-1]) if any(tops) else 0)
    best = [tuple(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    return [TokenLogprob(t, lp, b[:n]) for t, lp, b, n in zip(targets, chosen, best, tops, strict=True)]


def _params(selection: Selection) -> SamplingParams:
    return selection.row.sequence.request.params
