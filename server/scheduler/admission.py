"""Who gets slots and rows, at whose cost: how sequences come to run and how they stop to."""

from __future__ import annotations

from collections.abc import Callable

from server.scheduler import fairness
from server.scheduler.limits import Limits
from server.scheduler.sequence import Sequence
from server.scheduler.service import GENERATED_WEIGHT, Service
from server.scheduler.space import Space
from server.scheduler.waiting import Line, WaitingQueue

# Own slots reserved beyond the prompt at admission; a longer answer doubles its extent as it grows.
HEADROOM = 64


class Admission:
    """Moves sequences between `waiting` and `running`, which is in order of admission: the last is the newest."""

    def __init__(
        self, limits: Limits, space: Space, service: Service, waiting: WaitingQueue, clock: Callable[[], float]
    ) -> None:
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._refused_at: tuple[int, int] | None = None
        self._waiting = waiting
        self._space = space
        self._service = service
        self._most_rows = limits.most_rows
        # the longest row costs no more
        self._allowance = GENERATED_WEIGHT * limits.context_length + limits.source_slots
        self._clock = clock

    @property
    def rows(self) -> int:
        """Rows of a step that those which run take."""
        return sum(sequence.width for sequence in self.running)

    @property
    def entitled(self) -> list[Line]:
        """The waiting lines whose first gets a row at once, if need be at the cost of others."""
        if not self._waiting or not (self.rows < self._most_rows or self._can_make_way()):
            return []
        return self._turns()[0]

    @property
    def is_closed(self) -> bool:
        """Whether it is known that of those who wait nobody could be let in as things are."""
        if not self._waiting:
            return True
        return (self.rows == self._most_rows or self._refused_at == self._state) and not self.entitled

    def let_in(self) -> None:
        """Has the entitled run."""
        while lines := self.entitled:
            if self._first(lines, self._place_by_force) is None:
                return

    def next(self, most: float) -> Sequence | None:
        """Has run whoever is next, of those whose source is shorter than `most`; None where nobody fits."""
        if self.rows == self._most_rows:
            return None
        lines = [line for turn in self._turns() for line in turn if line.first.source_length < most]
        before = self._state
        sequence = self._first(lines, self._place)
        # asking in vain may have evicted prefixes, and made room for who was asked before
        if sequence is None and len(lines) == len(self._waiting.lines) and self._state == before:
            self._refused_at = before
        return sequence

    def bring_preloads(self) -> None:
        """Finds room for what is to be preloaded, if need be at the cost of rows."""
        while not self._space.bring():
            if self.running:
                self.preempt(fairness.newest_of_most(self.running, fairness.rows_by_tenant(self.running)))
            else:
                self._space.compact()

    def make_room(self, sequence: Sequence) -> bool:
        """Sees to a slot for the sequence's next token; False if the sequence itself had to be preempted."""
        while not self._space.grow(sequence, sequence.computed):
            # Those before it may be planned already, and what is planned is never taken back.
            candidates = self.running[self.running.index(sequence) :]
            newest = fairness.newest_of_most(candidates, fairness.rows_by_tenant(self.running))
            self.preempt(newest)
            if newest is sequence:
                return False
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Takes a sequence's row and slots away; it is first of its tenant's line, to be computed again."""
        self.leave(sequence)
        sequence.forget()
        self.preemptions += 1
        self._waiting.push_front(sequence)

    def leave(self, sequence: Sequence) -> None:
        """A sequence runs no more."""
        self.running.remove(sequence)
        self._space.vacate(sequence)

    @property
    def _state(self) -> tuple[int, int]:
        """What a refusal goes by: who waits, and what has been free."""
        return self._waiting.changes, self._space.slots.releases

    def _can_make_way(self) -> bool:
        rows = fairness.rows_by_tenant(self.running)
        return len(rows) < len(self.running) or any(line.tenant in rows for line in self._waiting.lines)

    def _turns(self) -> tuple[list[Line], list[Line]]:
        return fairness.turns(self._waiting.lines, self.running, self._service, self._allowance)

    def _first(self, lines: list[Line], place: Callable[[Sequence], bool]) -> Sequence | None:
        """Admits from the first line whose first sequence can be placed."""
        for line in lines:
            sequence = line.first
            if place(sequence):
                self._waiting.remove(sequence)
                self.running.append(sequence)
                if sequence.admitted_at is None:
                    sequence.admitted_at = self._clock()
                return sequence
        return None

    def _place(self, sequence: Sequence) -> bool:
        size = _size(sequence)
        if self.rows + sequence.width > self._most_rows:
            return False
        if self._space.place(sequence, size):
            return True
        if self.running:
            return False
        # Prefixes lie across the pool so that no free run is long enough; compact, it fits by `check_fits`.
        self._space.compact()
        return self._space.place(sequence, size)

    def _place_by_force(self, sequence: Sequence) -> bool:
        if self._place(sequence):
            return True
        size = _size(sequence)
        waiting = {line.tenant: len(line) for line in self._waiting.lines}
        flooding = waiting.keys() if waiting[sequence.request.tenant] == 1 else ()

        def is_enough(leaving: list[Sequence]) -> bool:
            taken = self.rows - sum(other.width for other in leaving)
            return taken + sequence.width <= self._most_rows and self._space.would_fit(sequence, size, leaving)

        leaving = fairness.make_way(self.running, flooding, is_enough)
        if leaving is None:
            return False
        for other in leaving:
            self.preempt(other)
        self._space.make_run(sequence, size)
        return self._space.place(sequence, size)


def _size(sequence: Sequence) -> int:
    """Own slots to begin with. After a preemption the tokens may be as many as the final length, or one more."""
    return sequence.width * max(len(sequence.tokens), min(len(sequence.tokens) + HEADROOM, sequence.final_length))
