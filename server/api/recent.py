"""What the store lately answered, for the minutes in which it cannot be reached. Only for what changes nothing."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import anyio
import structlog
from anyio import to_thread

from prefix_store.errors import AntefixError, StoreUnavailable

# An answer is good for so long after the store gave it, if the store is away.
GOOD_SECONDS = 300.0
MOST = 10_000
# A store that needs longer than that is as good as away, and no request waits longer for it.
PATIENCE_SECONDS = 2.0
# How soon one that is away is asked again behind the back of a request that needs no answer.
PAUSE_SECONDS = 1.0
# Questions on their way at once: they hold threads of their own, and while the store is away only a few.
MANY, FEW = 32, 4
T = TypeVar("T")
_log = structlog.get_logger("antefix.store")


@dataclass
class _Question(Generic[T]):
    """`is_left`: nobody waits for it any more, so it need not begin."""

    place: Hashable
    store: Callable[[], T]
    is_left: bool = False


class _Line:
    """Questions on their way, in so many threads of their own."""

    def __init__(self, threads: int) -> None:
        self._limiter = anyio.CapacityLimiter(threads)
        self.asked: set[asyncio.Task[Any]] = set()  # the event loop itself would not keep them

    def send(self, work: Callable[[_Question[T]], T], question: _Question[T]) -> asyncio.Task[T]:
        """Has a thread do the work, whether or not anybody waits for it."""
        asked = asyncio.ensure_future(to_thread.run_sync(work, question, limiter=self._limiter))
        self.asked.add(asked)
        asked.add_done_callback(self._arrived)
        return asked

    def _arrived(self, asked: asyncio.Task[Any]) -> None:
        self.asked.discard(asked)
        if not asked.cancelled():
            asked.exception()  # else asyncio complains of one that nobody waited for


class Recent:
    """Remembers answers by `what` they are about and a key that names the asker. `forget` may be called anywhere."""

    def __init__(
        self, on_use: Callable[[str], object] = lambda what: None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`on_use` is told each time that an answer comes from memory, and what it was about."""
        self._on_use = on_use
        self._clock = clock
        self._lock = threading.Lock()
        self._known: OrderedDict[Hashable, tuple[float, Any]] = OrderedDict()
        self._forgot = float("-inf")
        self._away = False
        self._ask_again = 0.0
        self._many, self._few = _Line(MANY), _Line(FEW)

    @property
    def is_away(self) -> bool:
        """Whether the store did not answer lately, or not in time."""
        return self._away

    async def ask(
        self,
        what: str,
        key: Hashable,
        store: Callable[[], T],
        is_good: Callable[[T], bool] = lambda answer: True,
        *,
        fresh: bool = False,
    ) -> T:
        """What `store` returns or raises; while the store is away, what it returned last, if that is still good.

        `store` runs in a thread, and what it returns too late is remembered all the same. `fresh` is for what changes
        something: nothing but an answer of now will do. Raises StoreUnavailable soon where there is no answer.
        """
        place = (what, key)
        known = None if fresh else self._find(place, is_good)
        if not self._away:
            return await self._answer_of(_Question(place, store), self._many, what, known)
        if known:
            if self._is_time_to_ask():
                self._few.send(self._put, _Question(place, store))
            return self._use(what, known)
        if len(self._few.asked) >= FEW:
            raise StoreUnavailable("the store does not answer")
        return await self._answer_of(_Question(place, store), self._few, what, known)

    def forget(self, unwanted: Callable[[Any, Any], bool]) -> None:
        """Forgets answers by their `(what, key)` and what they are, those on their way included."""
        with self._lock:
            self._forgot = self._clock()
            for place in [place for place, (_, answer) in self._known.items() if unwanted(place, answer)]:
                del self._known[place]

    async def _answer_of(self, question: _Question[T], line: _Line, what: str, known: tuple[T] | None) -> T:
        asked = line.send(self._put, question)
        await asyncio.wait({asked}, timeout=PATIENCE_SECONDS)
        try:
            if asked.done():
                return asked.result()
            question.is_left = True
            self._set_away(True)
            raise StoreUnavailable(f"the store has not answered within {PATIENCE_SECONDS:g} s")
        except StoreUnavailable:
            if not known:
                raise
            return self._use(what, known)

    def _put(self, question: _Question[T]) -> T:
        """Asks the store, in a thread, and remembers what it says."""
        if question.is_left:
            raise StoreUnavailable("nobody waits for the answer")
        begun = self._clock()
        try:
            answer = question.store()
        except StoreUnavailable:
            self._set_away(True)
            raise
        except AntefixError:
            self._set_away(self._clock() > begun + PATIENCE_SECONDS)
            with self._lock:
                self._known.pop(question.place, None)
            raise
        self._set_away(self._clock() > begun + PATIENCE_SECONDS)
        self._keep(question.place, begun, answer)
        return answer

    def _find(self, place: Hashable, is_good: Callable[[Any], bool]) -> tuple[Any] | None:
        with self._lock:
            at, answer = self._known.get(place, (float("-inf"), None))
        return (answer,) if at + GOOD_SECONDS > self._clock() and is_good(answer) else None

    def _keep(self, place: Hashable, at: float, answer: Any) -> None:
        with self._lock:
            if at <= self._forgot:
                return  # it may be from before what was then changed
            if at < self._known.get(place, (at, None))[0]:
                return  # a question that was put later has been answered before
            self._known[place] = at, answer
            self._known.move_to_end(place)
            if len(self._known) > MOST:
                self._known.popitem(last=False)

    def _use(self, what: str, known: tuple[T]) -> T:
        self._on_use(what)
        return known[0]

    def _is_time_to_ask(self) -> bool:
        """Whether nobody asks the store that is away, and nobody did a moment ago."""
        if self._few.asked or self._clock() < self._ask_again:
            return False
        self._ask_again = self._clock() + PAUSE_SECONDS
        return True

    def _set_away(self, away: bool) -> None:
        with self._lock:
            changed, self._away = self._away != away, away
            self._ask_again = self._clock() + PAUSE_SECONDS
        if changed:
            _log.warning(
                "the store is away; known prefixes and keys stay good for a while" if away else "the store is back"
            )
