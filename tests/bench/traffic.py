"""Requests that arrive at an engine's loop by themselves, and when each of their tokens came."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise

from server.engine.loop import EngineLoop
from server.scheduler.messages import GenerationRequest, TokenEvent

# The longest that any measurement may take before it is given up.
PATIENCE_SECONDS = 600.0
# Threads that prepare requests, as a server's do.
PREPARERS = 8


@dataclass
class Visit:
    """One request from outside: when it was begun, when the engine had it, when its tokens came."""

    begun: float
    ready: float = 0.0
    times: list[float] = field(default_factory=list)
    error: str | None = None
    note: str = ""

    @property
    def first_token(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.begun

    @property
    def gaps(self) -> list[float]:
        """Seconds between its tokens."""
        return [later - earlier for earlier, later in pairwise(self.times)]


Prepare = Callable[[int, Visit], GenerationRequest]


class Crowd:
    """Sends requests into a loop and waits for their ends."""

    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop
        self._changed = threading.Condition()
        self._open = 0

    def arrive(self, request: GenerationRequest, visit: Visit, on_end: Callable[[], None] | None = None) -> None:
        """Submits a request whose visit has begun. `on_end` is called on the engine's thread."""
        with self._changed:
            self._open += 1

        def take(event: TokenEvent) -> None:
            visit.times.extend([time.perf_counter()] * len(event.token_ids))
            if event.finish_reason is not None:
                visit.error = event.error
                if on_end is not None:
                    on_end()
                with self._changed:
                    self._open -= 1
                    self._changed.notify_all()

        visit.ready = time.perf_counter()
        self._loop.submit(request, take)

    def wait(self) -> None:
        """Until everything has ended. Raises TimeoutError if that takes far too long."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._open == 0, PATIENCE_SECONDS):
                raise TimeoutError(f"{self._open} requests have not ended")


def staggered(requests: Sequence[GenerationRequest], seed: int = 0) -> list[GenerationRequest]:
    """The same with answers of half to one and a half times the length: equal ones would all end in the same step."""
    draw, found = random.Random(seed), []
    for request in requests:
        usual = request.params.max_tokens
        length = draw.randint(max(1, usual // 2), usual + usual // 2)
        found.append(replace(request, params=replace(request.params, max_tokens=length)))
    return found


def closed(loop: EngineLoop, count: int, in_flight: int, prepare: Prepare) -> list[Visit]:
    """`count` requests, always so many of them at the same time; one that ends makes the next begin.

    `prepare` runs on a thread of its own, as resolving and loading do in the server.
    """
    crowd, visits = Crowd(loop), [Visit(0.0) for _ in range(count)]
    numbers, lock, done = iter(range(count)), threading.Lock(), threading.Semaphore(0)

    def begin() -> None:
        with lock:
            number = next(numbers, None)
        if number is None:
            return
        visit = visits[number]
        visit.begun = time.perf_counter()
        try:
            crowd.arrive(prepare(number, visit), visit, end)
        except Exception as error:
            visit.error = f"{type(error).__name__}: {error}"
            end()

    def end() -> None:
        pool.submit(begin)  # before the last release, which closes the pool
        done.release()

    with ThreadPoolExecutor(PREPARERS) as pool:
        for _ in range(in_flight):
            pool.submit(begin)
        for _ in range(count):
            if not done.acquire(timeout=PATIENCE_SECONDS):
                raise TimeoutError("the requests do not end")
    crowd.wait()
    _check(visits)
    return visits


def poisson(loop: EngineLoop, requests: Sequence[GenerationRequest], per_second: float, seed: int = 0) -> list[Visit]:
    """Arrivals independent of one another, at that rate, whether the engine keeps up or not."""
    draw, crowd, visits = random.Random(seed), Crowd(loop), []
    due = time.perf_counter()
    for request in requests:
        due += draw.expovariate(per_second)
        if (wait := due - time.perf_counter()) > 0:
            time.sleep(wait)
        visits.append(Visit(due))  # a generator that oversleeps must not make the engine look faster
        crowd.arrive(request, visits[-1])
    crowd.wait()
    _check(visits)
    return visits


def rate(visits: Sequence[Visit]) -> float:
    """Tokens per second, without the first and the last tenth: there the rows are not all taken."""
    times = sorted(at for visit in visits for at in visit.times)
    middle = times[len(times) // 10 : len(times) - len(times) // 10]
    return (len(middle) - 1) / (middle[-1] - middle[0])


def gaps(visits: Sequence[Visit]) -> list[float]:
    """Seconds between tokens, of all of them."""
    return [gap for visit in visits for gap in visit.gaps]


def _check(visits: Sequence[Visit]) -> None:
    errors = [visit.error for visit in visits if visit.error is not None]
    if errors:
        raise RuntimeError(f"{len(errors)} requests failed: {errors[0]}")
