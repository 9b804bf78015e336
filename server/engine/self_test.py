"""Proves at load that the engine computes what the plain model computes, or refuses the model with the reason."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache

from prefix_store.errors import ModelUnsupported
from prefix_store.geometry import Stack
from prefix_store.model import shortage, sites
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
    """A random text and its logits `[T, V]` by the plain model; the prefix is what its first tokens are to the others.

    What an encoder-decoder model's text is an answer to is the `source`, and some more tokens, which are a prefix to
    the source, too.
    """

    ids: tuple[int, ...]
    logits: torch.Tensor
    prefix: PrefixPayload | None
    source: tuple[int, ...] = ()


@torch.inference_mode()
def plain_truths(frozen: FrozenModel) -> list[Truth]:
    """A random text for each prefix length, through the plain model: call it before a runner binds the model."""
    generator = torch.Generator().manual_seed(0)
    texts, sources = (
        torch.randint(frozen.vocabulary_size, (len(PREFIX_LENGTHS), LENGTH), generator=generator).to(frozen.device)
        for _ in range(2)
    )
    if not frozen.is_encoder_decoder:
        return [_text(frozen, ids[None], length) for ids, length in zip(texts, PREFIX_LENGTHS, strict=True)]
    triples = zip(texts, sources, PREFIX_LENGTHS, strict=True)
    return [_answer(frozen, ids[None], source[None], length) for ids, source, length in triples]


def _text(frozen: FrozenModel, ids: torch.Tensor, length: int) -> Truth:
    # A cache made without the config keeps what has slid out of a window too.
    output = frozen.model(ids, past_key_values=DynamicCache(), use_cache=True)
    prefix = _prefix(_cached(output.past_key_values)[..., :length, :])
    return Truth(tuple(ids[0].tolist()), output.logits[0].float(), prefix)


def _answer(frozen: FrozenModel, ids: torch.Tensor, source: torch.Tensor, length: int) -> Truth:
    """All of a source sees all of it, so any part may be a prefix to the rest.

    Where positions count from the first token it is the end, for the rest to keep its own; where they are relative it
    is the beginning, for that is where a prefix stands.
    """
    model, cache = frozen.model, EncoderDecoderCache(DynamicCache(), DynamicCache())
    encoded: dict[tuple[int, int], torch.Tensor] = {}
    hooks = _listen(model, encoded)
    output = model(input_ids=source, decoder_input_ids=ids, past_key_values=cache, use_cache=True)
    for hook in hooks:
        hook.remove()
    layers, _, heads, size = frozen.geometry.kv_shape_of(Stack.ENCODER)
    encoder = torch.stack([encoded[place] for place in sorted(encoded)]).view(layers, 2, LENGTH, heads, size)
    rest = LENGTH - length
    part, own = (slice(length), slice(length, None)) if frozen.is_relative else (slice(rest, None), slice(rest))
    prefix = _prefix(_cached(cache.self_attention_cache)[..., :length, :])
    if prefix is not None:
        cross = _cached(cache.cross_attention_cache)[..., part, :]
        prefix = replace(prefix, stacks=tuple(Stack), cross=cross, encoder=encoder.transpose(2, 3)[..., part, :])
    return Truth(tuple(ids[0].tolist()), output.logits[0].float(), prefix, tuple(source[0, own].tolist()))


def _listen(model: Any, heard: dict[tuple[int, int], torch.Tensor]) -> list[Any]:
    """Notes what the encoder makes of its source, `[1, S, H * D]` by layer and by whether it is keys, 0, or values."""
    hooks = []
    for module in model.get_encoder().modules():
        if hasattr(module, "layer_idx"):
            for index, names in enumerate((("k_proj", "k"), ("v_proj", "v"))):
                projection = next(getattr(module, name) for name in names if hasattr(module, name))
                note = partial(_note, heard, (sites.of(module).layer, index))
                hooks.append(projection.register_forward_hook(note))
    return hooks


def _note(heard: dict[tuple[int, int], torch.Tensor], place: tuple[int, int], *seen: Any) -> None:
    heard[place] = seen[-1]


def _cached(cache: Any) -> torch.Tensor:
    """Canonical `[L, 2, Hkv, T, D]`."""
    return torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])


def _prefix(kv: torch.Tensor) -> PrefixPayload | None:
    length = kv.shape[3]
    return PrefixPayload(f"text {length}", length, length, slides=True, tensor=kv) if length else None


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
        if shortage.ran_out(error):
            raise
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
        batch = build(plan, runner.windows, relative=runner.frozen.is_relative)
        logits = runner.run(batch)
        results = []
        for selection in batch.selections:
            truth = truths[int(selection.row.sequence.request.id)]
            worst = max(worst, _difference(logits, selection, truth))
            results.append(_forced(selection, truth))
        scheduler.commit(plan, results)
    return worst


def _request(index: int, truth: Truth) -> GenerationRequest:
    params = SamplingParams(max_tokens=LENGTH - PROMPT_END, temperature=0.0)
    prompt = truth.ids[PREFIX_LENGTHS[index] : PROMPT_END]
    return GenerationRequest(str(index), "", prompt, params, truth.prefix, source_ids=truth.source)


def _last_index(selection: Selection) -> int:
    """Where in the whole text the row's last token stands."""
    row = selection.row
    prefix = row.sequence.request.prefix
    return (prefix.virtual_tokens if prefix else 0) + row.end - 1


def _difference(logits: torch.Tensor, selection: Selection, truth: Truth) -> float:
    if not selection.row.samples:
        return 0.0
    expected = truth.logits[_last_index(selection)]
    difference = (logits[selection.first].float() - expected).abs().max() / expected.abs().max()
    return float(difference.nan_to_num(torch.inf))


def _forced(selection: Selection, truth: Truth) -> RowResult:
    """The text's own next token instead of a sampled one."""
    return RowResult(truth.ids[min(_last_index(selection) + 1, LENGTH - 1)] if selection.row.samples else None)
