"""Whether the store answers, known within a second: probes do not wait as long as a store may take to fail."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future

from prefix_store.errors import AntefixError

# A store that needs longer than that is as good as away; a probe has given up soon after, and counts it as a failure.
PATIENCE_SECONDS = 0.8


class Reach:
    """Asks with one thread at a time, however many want to know: a store that hangs must not fill the server."""

    def __init__(self, ping: Callable[[], None]) -> None:
        """`ping` raises AntefixError where the store does not answer."""
        self._ping = ping
        self._lock = threading.Lock()
        self._asking: Future[bool] | None = None

    async def answers(self) -> bool:
        """Whether it has answered in time."""
        asked = asyncio.wrap_future(self._ask())
        await asyncio.wait({asked}, timeout=PATIENCE_SECONDS)
        return asked.done() and asked.result()

    def _ask(self) -> Future[bool]:
        with self._lock:
            if self._asking is None or self._asking.done():
                self._asking = Future()
                threading.Thread(target=self._answer, args=(self._asking,), name="reach", daemon=True).start()
            return self._asking

    def _answer(self, asked: Future[bool]) -> None:
        try:
            self._ping()
        except AntefixError:
            asked.set_result(False)
        except BaseException as error:
            asked.set_exception(error)
        else:
            asked.set_result(True)
