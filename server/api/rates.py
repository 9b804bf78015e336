"""How much a tenant may ask for in a minute, and how many of its sequences may run at the same time."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import structlog
from limits.aio.storage import Storage
from limits.aio.storage.base import SlidingWindowCounterSupport
from limits.errors import StorageError
from limits.storage import storage_from_string

from prefix_store.errors import QuotaExceeded, RateLimited, StoreUnavailable
from prefix_store.store import REDIS_SCHEMES
from prefix_store.tenants import Quotas

MINUTE = 60
# Changed quotas are known everywhere after as long.
QUOTAS_SECONDS = 5.0
REDIS_SECONDS = 2.0
# What counts at any rate has no bound.
UNBOUNDED = 2**53
_log = structlog.get_logger("antefix.rates")


def counters(store_url: str | None) -> Any:
    """Where the minutes are counted: in the store's Redis, which all servers share, or else in this process."""
    if store_url is None or not store_url.startswith(REDIS_SCHEMES):
        return storage_from_string("async+memory://")
    scheme = "async+redis+" if store_url.startswith("unix:") else "async+"
    options = {"socket_timeout": REDIS_SECONDS, "socket_connect_timeout": REDIS_SECONDS}
    return storage_from_string(
        scheme + store_url, implementation="redispy", key_prefix="antefix:rate", wrap_exceptions=True, **options
    )


class Rates:
    """Counts for every tenant, by quotas that are read from the store now and then.

    Requests and tokens are counted in a window that slides over a minute. Tokens are let in while there is room for
    one, for nobody knows beforehand how many an answer will have; what was really used is then counted, and the next
    request waits for the longer. Where the counters cannot be reached nobody is refused.
    """

    def __init__(
        self,
        quotas: Callable[[str], Awaitable[Quotas]],
        storage: Storage | SlidingWindowCounterSupport,
        clock: Callable[[], float],
        are_away: Callable[[], bool] = lambda: False,
    ) -> None:
        """`are_away` knows whether there is no use in asking the counters, which may be long in failing."""
        self._read_quotas = quotas
        self._storage: Any = storage
        self._clock = clock
        self._are_away = are_away
        self._known: dict[str, tuple[float, Quotas]] = {}
        self._running: Counter[str] = Counter()

    async def count_request(self, tenant: str) -> None:
        """Counts a request. Raises RateLimited."""
        most = (await self._quotas(tenant)).requests_per_minute
        if most is not None and not await self._counted("requests", tenant, 1, most):
            await self._refuse("requests", tenant, most)

    async def count_generated(self, tenant: str, tokens: int) -> None:
        """Counts an answer's tokens."""
        if tokens and (await self._quotas(tenant)).tokens_per_minute is not None:
            await self._counted("tokens", tenant, tokens, UNBOUNDED)

    async def start(self, tenant: str, sequences: int, prompt_tokens: int, param: str = "n") -> None:
        """Counts a prompt, and sequences that run in this server from now on until `end`.

        Raises RateLimited, and QuotaExceeded for more sequences, which `param` asked for, than may ever run.
        """
        quotas = await self._quotas(tenant)
        tokens = quotas.tokens_per_minute
        if tokens is not None and await self._wait("tokens", tenant, tokens) > 0:
            await self._refuse("tokens", tenant, tokens)
        most = quotas.concurrent_sequences
        if most is not None and sequences > most:
            raise QuotaExceeded(
                f"this tenant may run {most} sequences at a time; {sequences} were asked for", param=param
            )
        if most is not None and self._running[tenant] + sequences > most:
            raise _limited(f"this tenant may run {most} sequences at a time; {self._running[tenant]} run now", 1)
        self._running[tenant] += sequences
        try:
            if tokens is not None:
                await self._counted("tokens", tenant, prompt_tokens, UNBOUNDED)
        except BaseException:
            self.end(tenant, sequences)
            raise

    def end(self, tenant: str, sequences: int) -> None:
        """Counts the sequences no more."""
        self._running[tenant] -= sequences
        if not self._running[tenant]:
            del self._running[tenant]

    async def headers(self, tenant: str) -> dict[str, str]:
        """What is left of the minute, under OpenAI's names: nothing where there is no quota, or nothing is counted.

        `reset` is until all of it is there again, as a duration of Go's.
        """
        quotas = await self._quotas(tenant)
        found: dict[str, str] = {}
        for what, most in (("requests", quotas.requests_per_minute), ("tokens", quotas.tokens_per_minute)):
            if most is not None and not self._are_away():
                with _reachable():
                    window = await self._storage.get_sliding_window(_key(what, tenant), MINUTE)
                    found[f"x-ratelimit-limit-{what}"] = str(most)
                    found[f"x-ratelimit-remaining-{what}"] = str(remaining(most, *window))
                    found[f"x-ratelimit-reset-{what}"] = f"{math.ceil(reset(*window))}s"
        return found

    async def _quotas(self, tenant: str) -> Quotas:
        until, quotas = self._known.get(tenant, (-math.inf, Quotas()))
        now = self._clock()
        if now >= until:
            with suppress(StoreUnavailable):  # what was known last is good enough until the store is back
                quotas = await self._read_quotas(tenant)
            self._known[tenant] = now + QUOTAS_SECONDS, quotas
        return quotas

    async def _counted(self, what: str, tenant: str, amount: int, most: int) -> bool:
        """Whether there was room."""
        if self._are_away():
            return True
        with _reachable():
            return bool(await self._storage.acquire_sliding_window_entry(_key(what, tenant), most, MINUTE, amount))
        return True

    async def _wait(self, what: str, tenant: str, most: int) -> float:
        """Seconds until there is room for one; 0 where there is."""
        if self._are_away():
            return 0.0
        with _reachable():
            return wait(most, *await self._storage.get_sliding_window(_key(what, tenant), MINUTE))
        return 0.0

    async def _refuse(self, what: str, tenant: str, most: int) -> None:
        seconds = math.ceil(await self._wait(what, tenant, most))
        raise _limited(f"this tenant may use {most} {what} a minute; there is room again in {seconds} s", seconds)


def wait(most: int, before: int, before_left: float, now: int, now_left: float) -> float:
    """Seconds until a window has room for one more; 0 where it has.

    Two minutes are counted: the one before, whose weight sinks to nothing within `before_left` seconds, and this one,
    which from `now_left` - 60 on is the one before.
    """
    if before * before_left / MINUTE + now < most:
        return 0.0
    if most == 0:
        return MINUTE
    left = before_left - MINUTE * (most - now) / before if now < most else now_left - MINUTE * most / now
    return max(left, 0.0) + 0.001  # at that very moment it is full still


def remaining(most: int, before: int, before_left: float, now: int, now_left: float) -> int:
    """How many more a window has room for; its numbers are `wait`'s."""
    return max(0, math.floor(most - now - before * before_left / MINUTE))


def reset(before: int, before_left: float, now: int, now_left: float) -> float:
    """Seconds until a window is empty."""
    return now_left if now else before_left if before else 0.0


def _limited(message: str, seconds: int) -> RateLimited:
    error = RateLimited(message)
    error.retry_after = max(1, seconds)
    return error


def _key(what: str, tenant: str) -> str:
    # no name in a store's files that would outlast the tenant's erasure
    return f"antefix/{what}/{hashlib.sha256(tenant.encode()).hexdigest()[:32]}"


@contextmanager
def _reachable() -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        _log.warning("rates are not counted", error=str(error)[:200])
