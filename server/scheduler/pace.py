"""How often requests end, and so how soon a full queue has a place again."""

from __future__ import annotations

import math
from collections import deque

REMEMBERED = 16
LONGEST = 60


class Pace:
    """The moments at which the last few requests ended, in seconds of one clock."""

    def __init__(self) -> None:
        self._ends: deque[float] = deque(maxlen=REMEMBERED)

    def note(self, now: float) -> None:
        """A request has ended."""
        self._ends.append(now)

    def seconds_to_wait(self, now: float) -> int:
        """Whole seconds in which one more should end, from 1 to LONGEST; the time since the last one counts too."""
        if not self._ends:
            return 1
        gap = (now - self._ends[0]) / len(self._ends)
        return min(LONGEST, max(1, math.ceil(gap)))
