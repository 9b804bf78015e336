"""Who runs how many tokens in the next step, and what follows from the tokens that came of it.

A step is `plan = schedule()`, the engine runs it, `events = commit(plan, results)`. A plan is made in four parts:

1. a tenant that waits and has no row is let in, if need be at the cost of the newest row of whoever has the most;
2. rows that decode go on, one token each;
3. prompts that have begun go on, in chunks: what is left of the token budget is shared equally between tenants, and
   while others decode it is no more than makes the step take 1.5 times as long, or 3 times as prompts pile up;
4. with the rest, and with what is set aside for that, whoever waits is admitted, least service first; within a tenant,
   in order of arrival.

When slots run out, prefixes nobody reads are evicted first; then rows are preempted: their own tokens are computed
again later, their prefix is not, and their output is the same.

A request that does not fit yet lets other tenants past until they are ahead of its own by as much as the longest
row could cost. From then on nobody else is admitted, and as rows end it will fit. So neither a large request nor a
stream of small ones holds the other up for ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from prefix_store.errors import GenerationFailed, OutOfMemory, Overloaded
from server.scheduler import backlog, beams, fairness, outcome
from server.scheduler.admission import Admission
from server.scheduler.limits import Limits, check_fits
from server.scheduler.messages import FinishReason, GenerationRequest, TokenEvent
from server.scheduler.pace import Pace
from server.scheduler.phases import Phases
from server.scheduler.plan import Load, Row, RowResult, StepPlan
from server.scheduler.sequence import Sequence
from server.scheduler.service import Service
from server.scheduler.space import Space
from server.scheduler.step_cost import StepCost
from server.scheduler.waiting import WaitingQueue


class Scheduler:
    """Owns the slots, the residents and every sequence. Not thread-safe: the engine loop holds a lock around it."""

    def __init__(self, limits: Limits, eos_ids: frozenset[int], clock: Callable[[], float]) -> None:
        self.limits = limits
        self.space = Space(limits.slots, limits.preloadable)
        self.slots, self.residency = self.space.slots, self.space.residency
        self.service = Service()
        self.waiting = WaitingQueue(limits.waiting, self.service)
        self.admission = Admission(limits, self.space, self.service, self.waiting, clock)
        self.running = self.admission.running
        self.phases = Phases()
        self._sequences: dict[str, Sequence] = {}
        self._pace = Pace()
        self._step_cost = StepCost()
        self._begun_at = 0.0  # the step that is committed next
        self._eos_ids = eos_ids
        self._clock = clock

    def add(self, request: GenerationRequest, seed: int) -> None:
        """Queues a request. Raises Overloaded, or ContextLengthExceeded / InvalidRequest if it can never run."""
        check_fits(request, self.limits)
        if request.id in self._sequences:
            raise KeyError(f"{request.id} is in flight already")
        sequence = beams.begin(request, seed, self._eos_ids)
        sequence.arrived_at = self._clock()
        try:
            self.waiting.push(sequence)
        except Overloaded as full:
            full.retry_after = self._pace.seconds_to_wait(self._clock())
            raise
        self._sequences[request.id] = sequence

    def abort(self, request_id: str, reason: FinishReason) -> TokenEvent | None:
        """Ends a request and frees its slots at once; None if it is unknown or has ended."""
        sequence = self._sequences.get(request_id)
        return self._finish(sequence, reason) if sequence is not None else None

    def expire(self) -> list[TokenEvent]:
        """Ends what is past its deadline."""
        now = self._clock()
        late = [sequence for sequence in self._sequences.values() if sequence.is_late(now)]
        return [self._finish(sequence, FinishReason.TIMEOUT) for sequence in late]

    def schedule(self) -> StepPlan:
        """Plans the next step; its rows are empty only when nothing is waiting or running."""
        self.admission.bring_preloads()
        self.admission.let_in()
        rows = self._decode_rows()
        unread = [sequence for sequence in self.running if sequence.is_unread]
        prompts = [sequence for sequence in self.running if sequence.remaining > 1 and not sequence.is_unread]
        ahead = backlog.of(prompts, self.waiting)
        budget = self._step_cost.prompt_budget(self.limits.step_tokens, len(rows), backlog.context(prompts), ahead)
        beside = self._admit(fairness.set_aside(budget, prompts, self.waiting.lines), unread)
        budget -= _tokens(beside)
        shares = fairness.share_out(budget, prompts)
        chunks = [row for sequence, count in shares for row in self._rows(sequence, count)]
        rows += chunks + beside + self._admit(budget - _tokens(chunks), unread, is_first=not chunks + beside)
        self._begun_at = self._clock()
        return StepPlan(self.space.take_transfers(), tuple(rows))

    def ahead(self, plan: StepPlan) -> StepPlan | None:
        """The step behind one that has not been committed; None where what comes of that may make it another one.

        All that run go on by a token each, but those that end whatever comes. One that turns out to have ended is
        computed in vain: its row is not alive then, and not to be committed.
        """
        rows = [row for row in plan.rows if row.is_alive]
        if len(rows) < len(self.running) or not all(row.samples and row.sequence.is_plain for row in rows):
            return None
        going = [row for row in rows if row.sequence.generated + 1 < row.sequence.request.params.max_tokens]
        is_certain = self.admission.is_closed and (len(going) == len(rows) or not self.waiting)
        if not going or self.space.preloads.missing or not is_certain:
            return None
        if not all(self.space.grow(row.sequence, row.end) for row in going):
            return None
        return StepPlan(self.space.take_transfers(), tuple(Row(row.sequence, row.end, 1) for row in going))

    def commit(self, plan: StepPlan, results: Iterable[RowResult]) -> list[TokenEvent]:
        """Applies what the rows of a plan produced, in the plan's order; they may be fewer and shorter than planned."""
        now = self._clock()
        if plan.rows and not plan.transfers:
            self._step_cost.note(*backlog.done(plan.rows), now - self._begun_at)
        self._begun_at = now  # one that was planned ahead runs from here on
        events = [self._commit_rows(*found) for found in outcome.by_sequence(plan.rows, results)]
        return [event for event in events if event is not None]

    def fail_running(self, why: str) -> list[TokenEvent]:
        """Ends what is running, after a step that broke; the residents go too, for their slots may be half written."""
        events = [self._finish(sequence, FinishReason.ERROR, GenerationFailed(why)) for sequence in list(self.running)]
        self.residency.clear()
        self.space.preloads.miss_none()  # it may be one of them that broke the step
        return events

    def lose(self, load: Load) -> list[TokenEvent]:
        """Ends whoever reads a prefix that there was no memory to bring, and forgets that it was to be there."""
        readers = [sequence for sequence in self.running if load.is_read_by(sequence)]
        events = [self._finish(sequence, FinishReason.ERROR, OutOfMemory()) for sequence in readers]
        self.residency.lose(load.payload.digest, load.extent)
        return events

    def end_all(self) -> list[TokenEvent]:
        """Ends what is running and what is waiting, as nothing more will be run."""
        return [self._finish(sequence, FinishReason.SHUTDOWN) for sequence in [*self.running, *self.waiting]]

    def check_integrity(self) -> None:
        """Raises AssertionError unless slots, lines and counters are in order and every sequence is in one place."""
        self.space.check_integrity(self.running)
        self.waiting.check_integrity()
        in_flight = [*self.running, *self.waiting]
        self.service.check_integrity(in_flight)
        assert self.admission.rows <= self.limits.most_rows, "more rows than there may be"
        assert {s.request.id: s for s in in_flight} == self._sequences, "a sequence is lost"
        assert len(in_flight) == len(self._sequences), "a sequence is in two places"
        assert all(s.extent is None and s.resident is None for s in self.waiting), "a waiting sequence holds slots"

    def _admit(self, budget: int, unread: list[Sequence], *, is_first: bool = False) -> list[Row]:
        """Rows that begin: those that were let in and are `unread`, which are taken from the list, then whoever waits.

        A source is read whole: one that is longer than the budget is only taken if it `is_first`, and none beside it.
        """
        rows: list[Row] = []
        while budget > 0:
            most = math.inf if is_first and not rows else budget
            sequence = unread[0] if unread else self.admission.next(most)
            if sequence is None or sequence.source_length >= most:
                break
            del unread[:1]
            count = max(1, min(budget - sequence.source_length, sequence.remaining))
            rows += (chunk := self._rows(sequence, count))
            budget -= _tokens(chunk)
        return rows

    def _decode_rows(self) -> list[Row]:
        rows: list[Row] = []
        for sequence in list(self.running):
            if sequence.is_decoding and sequence in self.running and self.admission.make_room(sequence):
                rows += self._rows(sequence, 1)
        return rows

    def _rows(self, sequence: Sequence, count: int) -> list[Row]:
        if not isinstance(sequence, beams.BeamGroup):
            return [Row(sequence, sequence.computed, count)]
        rows, moves = sequence.rows(count)
        self.space.move(moves)
        return rows

    def _finish(self, sequence: Sequence, reason: FinishReason, error: GenerationFailed | None = None) -> TokenEvent:
        self._end(sequence)
        hypotheses = sequence.given_up() if reason is FinishReason.TIMEOUT else ()
        return TokenEvent(sequence.request.id, finish_reason=reason, error=error, hypotheses=hypotheses)

    def _end(self, sequence: Sequence) -> None:
        if sequence in self.running:
            self.admission.leave(sequence)
        else:
            self.waiting.remove(sequence)
        self.service.settle(sequence)
        now = self._clock()
        self._pace.note(now)
        self.phases.note(sequence, now)
        del self._sequences[sequence.request.id]

    def _commit_rows(self, sequence: Sequence, rows: list[Row], results: list[RowResult]) -> TokenEvent | None:
        event, sampled = outcome.take(sequence, rows, results)
        self.service.charge(sequence, sampled=sampled)
        if sampled and sequence.first_token_at is None:
            sequence.first_token_at = self._clock()
        if event is not None and event.finish_reason is not None:
            self._end(sequence)
        return event


def _tokens(rows: Iterable[Row]) -> int:
    return sum(row.cost for row in rows)
