"""How long requests waited, read their prompt and wrote their answer."""

from __future__ import annotations

from server.distribution import SECONDS, Distribution
from server.scheduler.sequence import Sequence


class Phases:
    """Seconds of every request that has ended, however it ended; of one that began anew, from its first beginning."""

    def __init__(self) -> None:
        self.queue, self.prefill, self.decode = (Distribution(SECONDS) for _ in range(3))

    def note(self, sequence: Sequence, now: float) -> None:
        """A sequence has ended."""
        admitted, first = sequence.admitted_at, sequence.first_token_at
        self.queue.add((now if admitted is None else admitted) - sequence.arrived_at)
        if admitted is not None and first is not None:
            self.prefill.add(first - admitted)
            self.decode.add(now - first)
