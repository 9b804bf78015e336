"""The largest steps that requests can make an engine take: as many tokens as there may be, and logits for each."""

from __future__ import annotations

from server.engine.engine import Engine
from server.scheduler.limits import Limits
from server.scheduler.messages import GenerationRequest
from server.scheduler.plan import Row
from server.scheduler.sampling_params import MAX_LOGPROBS, SamplingParams
from server.scheduler.sequence import Sequence
from server.scheduler.slots import Extent


def run(engine: Engine) -> None:
    """Runs them on whatever is in the pool, which is then other numbers. Nothing may be in flight."""
    for rows in steps(engine.limits, engine.frozen.vocabulary_size):
        engine.compute(rows)


def steps(limits: Limits, vocabulary: int) -> list[list[Row]]:
    """Rows of each: of as many requests as there may be, and of one that is as long as the context.

    Beside an encoder also one that reads as much as there may be: a source is read whole. Rows share their slots, for
    only sizes count.
    """
    # what makes the sampler copy and sort all of a row's logits
    params = SamplingParams(
        max_tokens=1, top_k=max(1, vocabulary - 1), repetition_penalty=1.1, echo=True, logprobs=MAX_LOGPROBS
    )
    context, most, tokens = limits.context_length, limits.most_rows, limits.step_tokens
    source = context if limits.source_slots else 0
    counts = [tokens // most + (index < tokens % most) for index in range(most)]
    many = [_row(params, min(context, count), min(context, count), source) for count in counts]
    long = [_row(params, context, min(context, tokens), source)]
    if not source:
        return [many, long]
    left = [max(tokens, source) - index * source for index in range(most)]
    reads = [_row(params, 1, 1, min(source, size) if size > 0 else source, encodes=size > 0) for size in left]
    return [many, long, reads]


def _row(params: SamplingParams, length: int, count: int, source: int, *, encodes: bool = False) -> Row:
    """The last `count` tokens of a prompt of that length, with those of its source if it `encodes` that."""
    request = GenerationRequest("", "", (0,) * length, params, source_ids=(0,) * source)
    sequence = Sequence(request, seed=0)
    sequence.extent = Extent(0, length)
    if source:
        sequence.source = Extent(0, source)
        sequence.computed = 0 if encodes else max(1, length - count)
    return Row(sequence, length - count, count)
