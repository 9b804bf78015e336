"""Who runs how many tokens in the next step, and what follows from the tokens that came of it.

A step is `plan = schedule()`, the engine runs it, `events = commit(plan, results)`. Decoding goes first, prompts fill
the rest of the token budget in chunks, and admission is in order of arrival. When slots run out, prefixes nobody
reads are evicted first; then the newest sequence is preempted: its own tokens are computed again later, its prefix is
not, and its output is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prefix_store.errors import ContextLengthExceeded, InvalidRequest
from server.scheduler.messages import FinishReason, GenerationRequest, PrefixPayload, TokenEvent
from server.scheduler.plan import Load, Move, Row, RowResult, StepPlan
from server.scheduler.residency import Residency, Resident
from server.scheduler.sequence import Sequence
from server.scheduler.slots import Extent, SlotAllocator
from server.scheduler.waiting import WaitingQueue

# Own slots reserved beyond the prompt at admission; a longer answer doubles its extent as it grows.
HEADROOM = 64


@dataclass(frozen=True)
class Limits:
    """Sizes of an engine. `context_length` counts virtual, prompt and generated tokens together."""

    slots: int
    rows: int
    step_tokens: int
    context_length: int
    waiting: int


class Scheduler:
    """Owns the slots, the residents and every sequence. Not thread-safe: the engine loop holds a lock around it."""

    def __init__(self, limits: Limits, eos_ids: frozenset[int], clock: Callable[[], float]) -> None:
        self.limits = limits
        self.slots = SlotAllocator(limits.slots)
        self.residency = Residency(self.slots)
        self.waiting = WaitingQueue(limits.waiting)
        self.running: list[Sequence] = []  # in order of admission: the last is the newest
        self.preemptions = 0
        self._eos_ids = eos_ids
        self._clock = clock
        self._transfers: list[Load | Move] = []

    def add(self, request: GenerationRequest, seed: int) -> None:
        """Queues a request. Raises Overloaded, or ContextLengthExceeded / InvalidRequest if it can never run."""
        check_fits(request, self.limits)
        self.waiting.push(Sequence(request, seed))

    def abort(self, request_id: str, reason: FinishReason) -> TokenEvent | None:
        """Ends a request and frees its slots at once; None if it is unknown or has ended."""
        for sequence in [*self.running, *self.waiting]:
            if sequence.request.id == request_id:
                return self._finish(sequence, reason)
        return None

    def expire(self) -> list[TokenEvent]:
        """Ends what is past its deadline."""
        now = self._clock()
        late = [
            sequence
            for sequence in [*self.running, *self.waiting]
            if sequence.request.deadline is not None and sequence.request.deadline <= now
        ]
        return [self._finish(sequence, FinishReason.TIMEOUT) for sequence in late]

    def schedule(self) -> StepPlan:
        """Plans the next step; its rows are empty only when nothing is waiting or running."""
        self._transfers = []
        rows = self._decode_rows()
        budget = self.limits.step_tokens - len(rows)
        for sequence in self.running:
            if sequence.remaining > 1 and budget > 0:
                rows.append(_row(sequence, budget))
                budget -= rows[-1].count
        while budget > 0 and len(self.running) < self.limits.rows and self._admit_next():
            rows.append(_row(self.running[-1], budget))
            budget -= rows[-1].count
        return StepPlan(tuple(self._transfers), tuple(rows))

    def commit(self, plan: StepPlan, results: Iterable[RowResult]) -> list[TokenEvent]:
        """Applies what the rows of a plan produced, in the plan's order."""
        events = [self._commit_row(row, result) for row, result in zip(plan.rows, results, strict=True)]
        return [event for event in events if event is not None]

    def fail_running(self, error: str) -> list[TokenEvent]:
        """Ends what is running, after a step that broke; the residents go too, for their slots may be half written."""
        events = [self._finish(sequence, FinishReason.ERROR, error) for sequence in list(self.running)]
        self.residency.clear()
        return events

    def fail_all(self, error: str) -> list[TokenEvent]:
        """Ends what is running and what is waiting."""
        waiting = [self._finish(sequence, FinishReason.ERROR, error) for sequence in list(self.waiting)]
        return self.fail_running(error) + waiting

    def check_integrity(self) -> None:
        """Raises AssertionError unless every slot is free or held by exactly one owner, and pins equal readers."""
        self.slots.check_integrity()
        residents = self.residency.residents()
        owners = [s.extent.size for s in self.running if s.extent] + [r.extent.size for r in residents]
        assert sum(owners) == self.slots.used, "slots are held that nobody owns"
        for resident in residents:
            readers = sum(sequence.resident is resident for sequence in self.running)
            assert resident.pins == readers, f"{resident.pins} pins, {readers} readers"
        assert all(s.extent is None and s.resident is None for s in self.waiting), "a waiting sequence holds slots"

    def _decode_rows(self) -> list[Row]:
        rows: list[Row] = []
        # Preemption takes from the end, so a row that is planned already is never taken back.
        for sequence in list(self.running):
            if sequence.remaining == 1 and sequence in self.running and self._make_room(sequence):
                rows.append(Row(sequence, sequence.computed, 1))
        return rows

    def _make_room(self, sequence: Sequence) -> bool:
        """Sees to a slot for the sequence's next token; False if the sequence itself had to be preempted."""
        extent = sequence.extent
        assert extent is not None
        if sequence.computed < extent.size:
            return True
        size = min(2 * extent.size, sequence.final_length)
        grown = self.slots.grow(extent, size)
        while grown is None:
            grown = self._allocate(size)
            if grown is not None:
                self._transfers.append(Move(extent, grown, sequence.computed))
                self.slots.release(extent)
            elif self._preempt(self.running[-1]) is sequence:
                return False
            else:
                grown = self.slots.grow(extent, size)
        sequence.extent = grown
        return True

    def _admit_next(self) -> bool:
        sequence = self.waiting.peek()
        if sequence is None:
            return False
        admitted = self._place(sequence)
        if not admitted and not self.running:
            # Idle prefixes lie across the pool so that no free run is long enough; empty, it fits by `check_fits`.
            self.residency.clear()
            admitted = self._place(sequence)
        if admitted:
            self.running.append(self.waiting.pop())
        return admitted

    def _place(self, sequence: Sequence) -> bool:
        """Finds slots for a sequence and its prefix; False, with nothing held, if there are none."""
        payload = sequence.request.prefix
        resident = self._pin(payload) if payload is not None else None
        if payload is not None and resident is None:
            return False
        # After a preemption the tokens may already be as many as the final length, or one more.
        size = max(len(sequence.tokens), min(len(sequence.tokens) + HEADROOM, sequence.final_length))
        extent = self._allocate(size)
        if extent is None:
            if resident is not None:
                self.residency.unpin(resident)
            return False
        sequence.resident, sequence.extent = resident, extent
        if resident is not None:
            self.residency.count_start(resident)
        return True

    def _pin(self, payload: PrefixPayload) -> Resident | None:
        resident = self.residency.pin(payload.digest)
        if resident is None and (extent := self._allocate(payload.virtual_tokens)) is not None:
            resident = self.residency.admit(payload, extent)
            self._transfers.append(Load(payload, extent))
        return resident

    def _allocate(self, size: int) -> Extent | None:
        """Slots, at the cost of idle prefixes if that helps; evicting them for nothing would only load them again."""
        extent = self.slots.allocate(size)
        if extent is None and self.slots.longest_run(self.residency.idle_extents()) < size:
            return None
        while extent is None and self.residency.evict_one():
            extent = self.slots.allocate(size)
        return extent

    def _preempt(self, sequence: Sequence) -> Sequence:
        self._vacate(sequence)
        sequence.computed = 0
        sequence.prompt_logprobs.clear()
        self.preemptions += 1
        self.waiting.push_front(sequence)
        return sequence

    def _vacate(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        if sequence.extent is not None:
            self.slots.release(sequence.extent)
        if sequence.resident is not None:
            self.residency.unpin(sequence.resident)
        sequence.extent = sequence.resident = None

    def _finish(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> TokenEvent:
        if sequence in self.running:
            self._vacate(sequence)
        else:
            self.waiting.remove(sequence)
        return TokenEvent(sequence.request.id, finish_reason=reason, error=error)

    def _commit_row(self, row: Row, result: RowResult) -> TokenEvent | None:
        sequence = row.sequence
        sequence.computed += row.count
        sequence.prompt_logprobs.extend(result.scored)
        if result.error is not None:
            return self._finish(sequence, FinishReason.ERROR, result.error)
        if result.token_id is None:
            return None
        reason = self._reason_to_stop(sequence, result.token_id)
        stopped = reason is FinishReason.STOP
        sequence.tokens.append(result.token_id)
        prompt_logprobs = sequence.scored_prompt() if sequence.wants_prompt_logprobs else None
        sequence.prompt_logprobs_sent |= prompt_logprobs is not None
        if reason is not None:
            self._vacate(sequence)
        return TokenEvent(
            sequence.request.id,
            token_ids=() if stopped else (result.token_id,),
            finish_reason=reason,
            logprobs=() if stopped or result.logprob is None else (result.logprob,),
            prompt_logprobs=prompt_logprobs,
        )

    def _reason_to_stop(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        params = sequence.request.params
        if token_id in params.stop_token_ids or (token_id in self._eos_ids and not params.ignore_eos):
            return FinishReason.STOP
        return FinishReason.LENGTH if sequence.generated + 1 >= params.max_tokens else None


def check_fits(request: GenerationRequest, limits: Limits) -> None:
    """Raises ContextLengthExceeded or InvalidRequest for a request that could never run."""
    virtual = request.prefix.virtual_tokens if request.prefix is not None else 0
    prompt, new = len(request.prompt_ids), request.params.max_tokens
    if not request.prompt_ids:
        raise InvalidRequest("the prompt is empty: at least one token is needed", param="prompt")
    if virtual + prompt + new > limits.context_length:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {limits.context_length} tokens; the request needs "
            f"{virtual + prompt + new}: {virtual} of the prefix, {prompt} of the prompt and {new} of max_tokens",
            param="max_tokens",
        )
    if virtual + prompt + new > limits.slots:
        raise InvalidRequest(
            f"the request needs {virtual + prompt + new} KV slots, this server has {limits.slots}", param="max_tokens"
        )


def _row(sequence: Sequence, budget: int) -> Row:
    return Row(sequence, sequence.computed, min(budget, sequence.remaining))
