"""Proves at load that the engine computes what the plain model computes, or refuses the model with the reason."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import DynamicCache

from prefix_store.errors import ModelUnsupported
from prefix_store.model.frozen import FrozenModel
from server.engine.batch import Selection, build
from server.engine.kv_pool import KVPool
from server.engine.model_runner import ModelRunner
from server.scheduler.messages import GenerationRequest, PrefixPayload
from server.scheduler.plan import RowResult
from server.scheduler.sampling_params import SamplingParams
from server.scheduler.scheduler import Limits, Scheduler

# Largest logit difference over largest logit; half precision rounds every layer, and in another order. The worst of
# all families is 1e-6, 0.040 and 0.005, and 0.077 for int8 beside bfloat16. A prefix off by one position is 0.12 (phi)
# to 1.2 (gpt2), so int8's is too wide for phi's: there it is the other dtypes that show it.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
INT8_TOLERANCE = 0.15
LENGTH = 24
PROMPT_END = 16
PREFIX_LENGTHS = (0, 1, 8)
LIMITS = Limits(slots=256, rows=4, step_tokens=7, context_length=LENGTH + 1, waiting=4)


@dataclass(frozen=True)
class Truth:
    """A random text, its logits `[T, V]` and its keys and values `[L, 2, Hkv, T, D]` by the plain model."""

    ids: tuple[int, ...]
    logits: torch.Tensor
    kv: torch.Tensor


@torch.inference_mode()
def plain_truths(frozen: FrozenModel) -> list[Truth]:
    """A random text for each prefix length, through the plain model: call it before a runner binds the model."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(frozen.vocabulary_size, (len(PREFIX_LENGTHS), LENGTH), generator=generator).to(frozen.device)
    # A cache made without the config keeps what has slid out of a window too.
    outputs = [frozen.model(row[None], past_key_values=DynamicCache(), use_cache=True) for row in ids]
    return [_truth(row.tolist(), output) for row, output in zip(ids, outputs, strict=True)]


def _truth(ids: list[int], output: Any) -> Truth:
    layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in output.past_key_values.layers]
    return Truth(tuple(ids), output.logits[0].float(), torch.stack(layers))


def check(runner: ModelRunner, truths: list[Truth]) -> None:
    """Runs the texts as rows of one batch, in chunks and token by token, each with its beginning as a prefix.

    A text's own beginning is a prefix whose effect the plain model tells without any notion of prefixes. Raises
    ModelUnsupported when a logit is off, or when the model does not go through the attention interface as needed.
    """
    family = runner.frozen.geometry.family
    tolerance = INT8_TOLERANCE if runner.int8 else TOLERANCES[runner.frozen.dtype]
    try:
        worst = _worst_difference(runner, truths)
    except ModelUnsupported as error:
        raise ModelUnsupported(f"{family}: {error.message}") from error
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise ModelUnsupported(
            f"{family}: the model does not run through transformers' attention interface as needed: "
            f"{type(error).__name__}: {str(error)[:200]}"
        ) from error
    if not worst <= tolerance:
        raise ModelUnsupported(
            f"{family}: packed rows differ from the plain model by {worst:.1e} of the largest logit "
            f"(at most {tolerance:.0e} is rounding): it would be served wrong"
        )


def _worst_difference(runner: ModelRunner, truths: list[Truth]) -> float:
    pool: KVPool = runner.pool
    scheduler = Scheduler(replace(LIMITS, slots=min(LIMITS.slots, pool.slots)), frozenset(), clock=lambda: 0.0)
    for index, truth in enumerate(truths):
        scheduler.add(_request(index, truth), seed=0)
    worst = 0.0
    while scheduler.running or scheduler.waiting:
        plan = scheduler.schedule()
        for transfer in plan.transfers:
            pool.apply(transfer)
        batch = build(plan, runner.windows, runner.frozen.device)
        logits = runner.run(batch)
        results = []
        for selection in batch.selections:
            truth = truths[int(selection.row.sequence.request.id)]
            worst = max(worst, _difference(logits, selection, truth))
            results.append(_forced(selection, truth))
        scheduler.commit(plan, results)
    return worst


def _request(index: int, truth: Truth) -> GenerationRequest:
    length = PREFIX_LENGTHS[index]
    prefix = None
    if length:
        prefix = PrefixPayload(f"text {index}", length, length, slides=True, tensor=truth.kv[..., :length, :])
    params = SamplingParams(max_tokens=LENGTH - PROMPT_END, temperature=0.0)
    return GenerationRequest(str(index), "", truth.ids[length:PROMPT_END], params, prefix)


def _last_index(selection: Selection) -> int:
    """Where in the whole text the row's last token stands."""
    row = selection.row
    prefix = row.sequence.request.prefix
    return (prefix.virtual_tokens if prefix else 0) + row.start + row.count - 1


def _difference(logits: torch.Tensor, selection: Selection, truth: Truth) -> float:
    if not selection.row.samples:
        return 0.0
    expected = truth.logits[_last_index(selection)]
    difference = (logits[selection.first].float() - expected).abs().max() / expected.abs().max()
    return float(difference.nan_to_num(torch.inf))


def _forced(selection: Selection, truth: Truth) -> RowResult:
    """The text's own next token instead of a sampled one."""
    return RowResult(truth.ids[min(_last_index(selection) + 1, LENGTH - 1)] if selection.row.samples else None)
