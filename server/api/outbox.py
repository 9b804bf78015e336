"""Events on their way from the engine's thread into an event loop, which is woken once for all of a step's.

Waking it costs the engine's thread a system call, and with it perhaps the interpreter, for every event.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from weakref import WeakKeyDictionary

from server.scheduler.messages import TokenEvent

Queue = asyncio.Queue[TokenEvent]


class Outbox:
    """Takes events in the engine's thread; in the event loop each is put into its own queue, in the same order."""

    def __init__(self) -> None:
        self._pending: deque[tuple[Queue, TokenEvent]] = deque()
        self._is_woken = False

    def put(self, loop: asyncio.AbstractEventLoop, queue: Queue, event: TokenEvent) -> None:
        """Raises RuntimeError once the event loop, which is always the same, is closed."""
        self._pending.append((queue, event))
        if not self._is_woken:
            self._is_woken = True
            loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        # first, for what is put from here on must wake it again
        self._is_woken = False
        while self._pending:
            queue, event = self._pending.popleft()
            queue.put_nowait(event)


# An event loop's own, for as long as it lives: an outbox must not hold it.
_outboxes: WeakKeyDictionary[asyncio.AbstractEventLoop, Outbox] = WeakKeyDictionary()


def sink(queue: Queue) -> Callable[[TokenEvent], None]:
    """What the engine is to call with the events that shall come out of this queue, in the running event loop."""
    loop = asyncio.get_running_loop()
    outbox = _outboxes.setdefault(loop, Outbox())

    def deliver(event: TokenEvent) -> None:
        if not loop.is_closed():
            outbox.put(loop, queue, event)

    return deliver
