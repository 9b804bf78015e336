"""How many runs a worker has room for, and which of them makes way for a tenant that waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from prefix_store.job_needs import Takes
from prefix_store.job_queue import JobQueue
from trainer.job_run import JobRun

# Jobs that share a step. Arithmetic is the limit long before; a step should not take seconds.
MOST = 16


class Room:
    """For the runs in a list that somebody else keeps. `budget`: bytes that there are for them.

    `limit`: bytes that they may take, fewer than that once a step of several has run out of memory.
    """

    def __init__(self, budget: int, runs: Sequence[JobRun]) -> None:
        self.budget = self.limit = budget
        self._runs = runs
        self._wanted = 0  # bytes that the job which found no room needs

    @property
    def _training(self) -> list[JobRun]:
        """Those that take any; who is trained, and only waits for the store, is in nobody's way."""
        return [run for run in self._runs if run.cost]

    @property
    def used(self) -> int:
        """Bytes that the runs take, about."""
        return sum(run.cost for run in self._training)

    @property
    def is_there(self) -> bool:
        """Whether one more may be claimed: none while one is tried alone, or into the room that is kept for another."""
        if any(run.is_suspect for run in self._runs):
            return False
        return not self._training or (len(self._training) < MOST and self.used + self._wanted <= self.limit)

    def fits(self, cost: int) -> bool:
        """Whether a run that is ready may join; one that is alone is always tried.

        For one that may not, its room is kept: no other is claimed before, so that it comes to its turn.
        """
        fits = not self._training or self.used + cost <= self.limit
        self._wanted = 0 if fits else cost
        return fits

    def empty(self) -> None:
        """Nobody is here: what several could not share is no measure of what the next ones can."""
        self.limit = self.budget

    def shrink(self) -> None:
        """The runs have run out of memory together."""
        self.limit = min(self.limit, self.used - 1)

    def too_many(self) -> JobRun | None:
        """The newest of runs that take more than there is; the room that it needs is kept for it."""
        if len(self._training) < 2 or self.used <= self.limit:
            return None
        self._wanted = self._training[-1].cost
        return self._training[-1]

    def making_way(self, jobs: JobQueue, takes: Takes) -> JobRun | None:
        """The run that goes back into the queue, as there is no room and a tenant waits that has none here.

        The newest of whoever has several here; else the one that came first of those that have had their turn. Its
        tenant has more jobs running, here or elsewhere, than one that waits: else it would be first in the queue again.
        """
        if self.is_there or any(run.is_suspect for run in self._runs):
            return None
        here = Counter(run.job.tenant for run in self._training)
        several = [run for run in self._training[::-1] if here[run.job.tenant] > 1]
        several.sort(key=lambda run: -here[run.job.tenant])
        others = [run for run in self._training if here[run.job.tenant] == 1 and run.had_turn]
        able = [run for run in several + others if run.can_be_saved]
        if not able or not (waiting := jobs.waiting(takes) - here.keys()):
            return None
        busy = jobs.busy()
        fewest = min(busy[tenant] for tenant in waiting)
        return next((run for run in able if busy[run.job.tenant] > fewest), None)
