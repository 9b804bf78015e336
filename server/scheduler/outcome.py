"""What follows for a sequence from what the engine found for its rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Rows

from server.scheduler.beams import BeamGroup
from server.scheduler.messages import FinishReason, TokenEvent
from server.scheduler.plan import Row, RowResult
from server.scheduler.sequence import Sequence

Found = tuple[Sequence, list[Row], list[RowResult]]


def by_sequence(rows: Iterable[Row], results: Iterable[RowResult]) -> Iterator[Found]:
    """What belongs together: the rows of a group of beams stand side by side, any other sequence has one."""
    group: Found | None = None
    for row, result in zip(rows, results, strict=True):
        sequence = row.sequence
        if group is not None and group[0] is not sequence.owner:
            yield group
            group = None
        if sequence.width == 1:
            yield sequence, [row], [result]
        elif group is None:
            group = sequence.owner, [row], [result]
        else:
            group[1].append(row)
            group[2].append(result)
    if group is not None:
        yield group


def take(sequence: Sequence, rows: Rows[Row], results: Rows[RowResult]) -> tuple[TokenEvent | None, int]:
    """Applies the results of a sequence's rows of one step; an event with a finish reason ends it.

    With it comes how many tokens were sampled for somebody.
    """
    if isinstance(sequence, BeamGroup):
        return sequence.take(rows, results), sum(bool(result.candidates) for result in results)
    row, result = rows[0], results[0]
    sequence.computed += row.count
    sequence.prompt_logprobs.extend(result.scored)
    if result.error is not None:
        return TokenEvent(sequence.request.id, finish_reason=FinishReason.ERROR, error=result.error), 0
    if result.token_id is None:
        return None, 0
    return _next(sequence, result.token_id, result), 1 - sequence.is_mute


def _next(sequence: Sequence, token_id: int, result: RowResult) -> TokenEvent:
    reason = _reason_to_stop(sequence, token_id)
    stopped = reason is FinishReason.STOP
    silent = stopped or sequence.is_mute or sequence.forced is not None
    sequence.tokens.append(token_id)
    prompt_logprobs = sequence.scored_prompt() if sequence.wants_prompt_logprobs else None
    sequence.prompt_logprobs_sent |= prompt_logprobs is not None
    return TokenEvent(
        sequence.request.id,
        token_ids=() if silent else (token_id,),
        finish_reason=reason,
        logprobs=() if silent or result.logprob is None else (result.logprob,),
        prompt_logprobs=prompt_logprobs,
        end_logprob=result.logprob if stopped else None,
    )


def _reason_to_stop(sequence: Sequence, token_id: int) -> FinishReason | None:
    if token_id in sequence.end_ids and not sequence.is_mute and sequence.forced is None:
        return FinishReason.STOP
    return FinishReason.LENGTH if sequence.generated + 1 >= sequence.request.params.max_tokens else None
