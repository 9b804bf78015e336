"""What the store says now, or that it does not, known soon: who watches does not wait until it has failed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from prefix_store.errors import AntefixError

# A store that needs longer than that is as good as away; a probe has given up soon after, and counts it as a failure.
PATIENCE_SECONDS = 0.8
# A scraper is given up later, and the store is asked several things for it.
SCRAPE_SECONDS = 2.0
T = TypeVar("T")


class Reach(Generic[T]):
    """Asks with one thread at a time, however many want to know: a store that hangs must not fill the server."""

    def __init__(self, ask: Callable[[], T]) -> None:
        """`ask` raises AntefixError where the store does not answer."""
        self._ask_store = ask
        self._lock = threading.Lock()
        self._asking: Future[tuple[T] | None] | None = None

    async def answer(self) -> tuple[T] | None:
        """What it has answered in time; else None."""
        asked = asyncio.wrap_future(self._ask())
        await asyncio.wait({asked}, timeout=PATIENCE_SECONDS)
        return asked.result() if asked.done() else None

    def wait(self) -> tuple[T] | None:
        """The same for a scrape. Blocking."""
        try:
            return self._ask().result(SCRAPE_SECONDS)
        except TimeoutError:
            return None

    def _ask(self) -> Future[tuple[T] | None]:
        with self._lock:
            if self._asking is None or self._asking.done():
                self._asking = Future()
                threading.Thread(target=self._answer, args=(self._asking,), name="reach", daemon=True).start()
            return self._asking

    def _answer(self, asked: Future[tuple[T] | None]) -> None:
        try:
            answer = self._ask_store()
        except AntefixError:
            asked.set_result(None)
        except BaseException as error:
            asked.set_exception(error)
        else:
            asked.set_result((answer,))
