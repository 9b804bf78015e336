"""A step that the device was asked for and may still be busy with."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

from server.engine.batch import Unread
from server.engine.sampled import Sampled
from server.scheduler.plan import Load, StepDone, StepPlan


@dataclass(frozen=True)
class Launched:
    """`plan` and `lost` as in `StepDone`, and what is sampled for the plan's rows, piece by piece."""

    plan: StepPlan
    pieces: tuple[Sampled, ...]
    lost: tuple[Load, ...]
    begun: float

    @property
    def is_alive(self) -> bool:
        """Whether any of its rows still is."""
        return any(row.is_alive for row in self.plan.rows)

    @property
    def unread(self) -> Unread | None:
        """The tokens that a step behind it may go on with; None where the host has to look at them first."""
        return self.pieces[0].unread if len(self.pieces) == 1 else None

    def finish(self) -> StepDone:
        """Waits for what came of it, without the rows whose sequence has ended since."""
        results = chain.from_iterable(sampled.read() for sampled in self.pieces)
        done = [(row, result) for row, result in zip(self.plan.rows, results, strict=True) if row.is_alive]
        rows = tuple(row for row, _ in done)
        assert all(row.sequence.width > 1 or row.start == row.sequence.computed for row in rows), "a row began anew"
        plan = StepPlan(self.plan.transfers, rows)
        return StepDone(plan, [result for _, result in done], self.begun, self.lost)
