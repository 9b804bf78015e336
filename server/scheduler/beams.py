"""Beam search: of all answers that have been begun the likeliest few go on, as in transformers' `generate`.

To the scheduler a group of beams is one sequence that is `width` rows wide: it waits, is admitted, grows, is preempted
and ends as a whole. Its slots are one extent in as many equal parts, a beam in each. The prompt is computed once; then
all beams go on in lockstep, and one that lost its place takes up where a better one stands by a copy of those slots in
which the two differ. What all of them only read, as the prefix, is there once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from itertools import takewhile

from prefix_store.errors import GenerationFailed
from server.scheduler.messages import FinishReason, GenerationRequest, Hypothesis, TokenEvent, TokenLogprob
from server.scheduler.plan import Candidate, Move, Row, RowResult
from server.scheduler.sequence import Sequence
from server.scheduler.slots import Extent

Ranked = tuple[float, "Beam", Candidate]


def begin(request: GenerationRequest, seed: int, eos_ids: frozenset[int]) -> Sequence:
    """What the scheduler runs for a request."""
    return (Sequence if request.params.num_beams == 1 else BeamGroup)(request, seed, eos_ids)


@dataclass(eq=False, kw_only=True)
class Beam(Sequence):
    """One answer as it grows; `score` is the sum of its tokens' log-probabilities.

    `place` is the part of the group's extent that it lies in.
    """

    group: BeamGroup = field(repr=False)
    place: int = 0
    score: float = 0.0
    logprobs: tuple[TokenLogprob, ...] = ()

    @property
    def owner(self) -> Sequence:
        """The group, which has the slots."""
        return self.group


@dataclass(frozen=True)
class _Copy:
    """The slots `[first, end)` of one place are to be those of another."""

    source: int
    target: int
    first: int
    end: int


@dataclass(eq=False)
class BeamGroup(Sequence):
    """The beams of one request, best first, and the best hypotheses so far, which have ended.

    `tokens` and `computed` are the first beam's. Until the prompt has been computed there is only one beam.
    """

    beams: list[Beam] = field(init=False)
    hypotheses: list[Hypothesis] = field(default_factory=list, init=False)
    _copies: list[_Copy] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.beams = [Beam(self.request, self.seed, self.eos_ids, group=self)]

    @property
    def remaining(self) -> int:
        """Tokens still to be computed before all beams can take their next one together."""
        return sum(beam.remaining - 1 for beam in self.beams) + 1

    def rows(self, count: int) -> tuple[list[Row], list[Move]]:
        """Up to `count` tokens, or one for each beam if all of them decode, and what is to be copied before.

        After a preemption the first beam is computed again, and then of each other what it does not share with that.
        """
        first, *others = self.beams
        for beam in self.beams:
            beam.extent, beam.source, beam.resident = self._part(beam.place), self.source, self.resident
        if not others:
            return [Row(first, first.computed, count)], []
        if first.remaining > 1:
            return [Row(first, first.computed, min(count, first.remaining - 1))], []
        moves = self._take_copies()
        if self.remaining == 1:
            return [Row(beam, beam.computed, 1) for beam in self.beams], moves
        rows = []
        for beam in others:
            if part := min(count, beam.remaining - 1):
                rows.append(Row(beam, beam.computed, part))
                count -= part
        return rows, moves

    def forget(self) -> None:
        """Its slots are gone, and the beams are to be computed again."""
        first, *others = self.beams
        first.forget()
        self.computed = 0
        for beam in others:
            beam.computed = self._shared(first.tokens, beam.tokens)
        self._copies = [_Copy(first.place, beam.place, 0, beam.computed) for beam in others]

    def take(self, rows: Rows[Row], results: Rows[RowResult]) -> TokenEvent | None:
        """Applies what came of its rows in one step; an event only once the search has ended."""
        for row, result in zip(rows, results, strict=True):
            row.sequence.computed += row.count
            row.sequence.prompt_logprobs.extend(result.scored)
        self.computed = self.beams[0].computed
        error = next((result.error for result in results if result.error is not None), None)
        if error is not None:
            return TokenEvent(self.request.id, finish_reason=FinishReason.ERROR, error=error)
        if self.beams[0].remaining or self._goes_on([result.candidates for result in results]):
            return None
        return self._ended()

    def given_up(self) -> tuple[Hypothesis, ...]:
        """The best so far, those that have not ended among them."""
        begun = [beam for beam in self.beams if beam.generated]
        reason = FinishReason.TIMEOUT
        return tuple(self._best(_hypothesis(self, beam.score, beam, beam.generated, reason) for beam in begun))

    def _goes_on(self, candidates: Rows[Rows[Candidate]]) -> bool:
        """Gives every beam its next token; False once no answer could be better than those that have ended.

        As in transformers, an answer may end only where it is among the `width` best of all candidates, and the beams
        go on with the best of the others: there are fewer than `width` only where so few are possible.
        """
        params = self.request.params
        ranked: list[Ranked] = sorted(
            (
                (beam.score + candidate.logprob, beam, candidate)
                for beam, found in zip(self.beams, candidates, strict=True)
                for candidate in found
                if candidate.logprob > -math.inf
            ),
            key=lambda one: one[0],
            reverse=True,
        )
        length = self.generated + 1
        is_last = length >= params.max_tokens
        ended = [one for one in ranked[: self.width] if is_last or one[2].token_id in self.end_ids]
        self.hypotheses = self._best(self._ending(*one) for one in ended)
        open_ones = [one for one in ranked if one[2].token_id not in self.end_ids][: self.width]
        if is_last or not open_ones:
            return False
        if len(self.hypotheses) == self.width and not self._can_improve(open_ones[0][0], length):
            return False
        self._reorder(open_ones)
        return True

    def _can_improve(self, score: float, length: int) -> bool:
        """Whether the best beam may still become better than the worst hypothesis, by transformers' three rules.

        `early_stopping` False asks for the score that it would have if it ended here, "never" for the best possible.
        """
        params = self.request.params
        if params.early_stopping is True:
            return False
        if params.early_stopping == "never" and params.length_penalty > 0:
            length = params.max_tokens
        return _normalised(self, score, length) > self.hypotheses[-1].score

    def _reorder(self, chosen: Rows[Ranked]) -> None:
        """The first child of a beam stays in its place; the others get those of beams that do not go on."""
        lying = {beam.place: beam.tokens for beam in self.beams}
        going_on = {beam.place for _, beam, _ in chosen}
        free = [place for place in range(self.width) if place not in going_on]
        if not self.prompt_logprobs:
            self.prompt_logprobs = self.beams[0].prompt_logprobs
        beams = []
        for score, parent, candidate in chosen:
            place = parent.place
            if place in going_on:
                going_on.remove(place)
            else:
                place = free.pop(0)
                first = self._shared(lying[place], parent.tokens) if place in lying else 0
                self._copies.append(_Copy(parent.place, place, first, parent.computed))
            beams.append(_child(parent, candidate, score, place))
        self.beams = beams
        self.tokens, self.computed = beams[0].tokens, beams[0].computed

    def _ending(self, score: float, beam: Beam, candidate: Candidate) -> Hypothesis:
        if candidate.token_id in self.end_ids or beam.forced is not None:
            # an end that the model's rule puts where there is no more room is no end of the answer's own
            reason = FinishReason.STOP if beam.forced is None else FinishReason.LENGTH
            return _hypothesis(self, score, beam, beam.generated + 1, reason, candidate.scored)
        return _hypothesis(self, score, _child(beam, candidate, score, 0), beam.generated + 1, FinishReason.LENGTH)

    def _best(self, more: Iterable[Hypothesis]) -> list[Hypothesis]:
        """As many as there are beams; of equals those that ended first."""
        return sorted([*self.hypotheses, *more], key=lambda found: found.score, reverse=True)[: self.width]

    def _ended(self) -> TokenEvent:
        """As many hypotheses as beams: where fewer answers are possible the best is there again, as in transformers."""
        if not self.hypotheses:
            error = GenerationFailed("no token may come next: the model's rules and the request forbid all of them")
            return TokenEvent(self.request.id, finish_reason=FinishReason.ERROR, error=error)
        if not self.prompt_logprobs:
            self.prompt_logprobs = self.beams[0].prompt_logprobs
        best, missing = self.hypotheses[0], self.width - len(self.hypotheses)
        return TokenEvent(
            self.request.id,
            finish_reason=best.finish_reason,
            prompt_logprobs=self.scored_prompt() if self.wants_prompt_logprobs else None,
            hypotheses=(*self.hypotheses, *[best] * missing),
        )

    def _part(self, place: int) -> Extent:
        assert self.extent is not None
        return self.extent.part(place, self.width)

    def _take_copies(self) -> list[Move]:
        copies, self._copies = self._copies, []
        return [
            Move(self._part(copy.source).behind(copy.first), self._part(copy.target).behind(copy.first), size)
            for copy in copies
            if (size := copy.end - copy.first)
        ]

    def _shared(self, one: list[int], other: list[int]) -> int:
        """How many tokens two beams begin with alike: their slots hold the same."""
        start = self.prompt_length
        pairs = zip(one[start:], other[start:], strict=True)
        return start + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _child(parent: Beam, candidate: Candidate, score: float, place: int) -> Beam:
    scored = (*parent.logprobs, candidate.scored) if candidate.scored is not None else ()
    child = Beam(
        parent.request,
        parent.seed,
        parent.eos_ids,
        computed=parent.computed,
        prompt_logprobs_sent=True,
        group=parent.group,
        place=place,
        score=score,
        logprobs=scored,
    )
    child.tokens = [*parent.tokens, candidate.token_id]
    return child


def _hypothesis(
    group: BeamGroup, score: float, beam: Beam, length: int, reason: FinishReason, end: TokenLogprob | None = None
) -> Hypothesis:
    """A beam with its score by its length, which counts the token that ends it."""
    return Hypothesis(
        token_ids=tuple(beam.tokens[beam.prompt_length :]),
        score=_normalised(group, score, length),
        finish_reason=reason,
        logprobs=beam.logprobs,
        end_logprob=end,
    )


def _normalised(group: BeamGroup, score: float, length: int) -> float:
    """A score by the length of its answer, in which transformers counts what the model's rules begin it with."""
    return score / (group.request.forced_length + length) ** group.request.params.length_penalty
