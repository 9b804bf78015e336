"""What the store lately answered, for the minutes in which it cannot be reached. Only for what changes nothing."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import structlog

from prefix_store.errors import AntefixError, StoreUnavailable

# An answer is good for so long after the store gave it, if the store is away.
GOOD_SECONDS = 300.0
MOST = 10_000
# A store that is away is asked again by one request at a time, which may wait long for it.
PAUSE_SECONDS, PATIENCE_SECONDS = 1.0, 15.0
T = TypeVar("T")
_log = structlog.get_logger("antefix.store")


class Recent:
    """Remembers answers by `what` they are about and a key that names the asker. Safe to call from any thread."""

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

    def ask(
        self, what: str, key: Hashable, store: Callable[[], T], is_good: Callable[[T], bool] = lambda answer: True
    ) -> T:
        """What `store` returns or raises; while the store is away, what it returned last, if that is still good."""
        known = self._find((what, key), is_good)
        if known and self._is_left_alone():
            return self._use(what, known)
        begun = self._clock()
        try:
            answer = store()
        except StoreUnavailable:
            self._set_away(True)
            if not known:
                raise
            return self._use(what, known)
        except AntefixError:
            self._set_away(False)
            with self._lock:
                self._known.pop((what, key), None)
            raise
        self._set_away(False)
        self._keep((what, key), begun, answer)
        return answer

    def forget(self, unwanted: Callable[[Any, Any], bool]) -> None:
        """Forgets answers by their `(what, key)` and what they are, those on their way included."""
        with self._lock:
            self._forgot = self._clock()
            for place in [place for place, (_, answer) in self._known.items() if unwanted(place, answer)]:
                del self._known[place]

    def _find(self, place: Hashable, is_good: Callable[[Any], bool]) -> tuple[Any] | None:
        with self._lock:
            at, answer = self._known.get(place, (float("-inf"), None))
        return (answer,) if at + GOOD_SECONDS > self._clock() and is_good(answer) else None

    def _keep(self, place: Hashable, at: float, answer: Any) -> None:
        with self._lock:
            if at <= self._forgot:
                return  # it may be from before what was then changed
            self._known[place] = at, answer
            self._known.move_to_end(place)
            if len(self._known) > MOST:
                self._known.popitem(last=False)

    def _use(self, what: str, known: tuple[T]) -> T:
        self._on_use(what)
        return known[0]

    def _is_left_alone(self) -> bool:
        """Whether the store is away and it is not this request that asks whether it is back."""
        with self._lock:
            if not self._away:
                return False
            if self._clock() < self._ask_again:
                return True
            self._ask_again = self._clock() + PATIENCE_SECONDS
            return False

    def _set_away(self, away: bool) -> None:
        with self._lock:
            changed, self._away = self._away != away, away
            self._ask_again = self._clock() + PAUSE_SECONDS
        if changed:
            _log.warning(
                "the store is away; known prefixes and keys stay good for a while" if away else "the store is back"
            )
