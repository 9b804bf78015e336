"""Sequences that wait for room, first come first served."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from prefix_store.errors import Overloaded
from server.scheduler.sequence import Sequence


class WaitingQueue:
    """A bounded queue; what was preempted goes back to the front and is never refused."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._queue: deque[Sequence] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._queue)

    def push(self, sequence: Sequence) -> None:
        """Adds at the end. Raises Overloaded when full."""
        if len(self._queue) >= self._limit:
            raise Overloaded(f"{len(self._queue)} requests are waiting already; try again later")
        self._queue.append(sequence)

    def push_front(self, sequence: Sequence) -> None:
        """Adds a preempted sequence before all others."""
        self._queue.appendleft(sequence)

    def peek(self) -> Sequence | None:
        """The next one, left in place."""
        return self._queue[0] if self._queue else None

    def pop(self) -> Sequence:
        """Takes the next one."""
        return self._queue.popleft()

    def remove(self, sequence: Sequence) -> None:
        """Takes that one out."""
        self._queue.remove(sequence)
