"""A server that was told to stop: it takes nothing new, and what it has begun gets some seconds to end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from prefix_store.errors import ShuttingDown
from server.api import errors
from server.metrics import Metrics

# Whoever watches is answered to the end.
WATCHED = frozenset({"/healthz", "/health", "/readyz", "/metrics"})


class Drain:
    """How many requests are being answered, and until when they may be. `begin` may be called in a signal handler."""

    def __init__(self, seconds: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._until: float | None = None
        self.running = 0

    def begin(self) -> None:
        """From now on nothing new is taken."""
        if self._until is None:
            self._until = self._clock() + self._seconds

    @property
    def has_begun(self) -> bool:
        """Whether the server was told to stop."""
        return self._until is not None

    @property
    def is_late(self) -> bool:
        """Whether the time is up."""
        return self._until is not None and self._clock() >= self._until

    @property
    def is_over(self) -> bool:
        """Whether there is nothing more to wait for."""
        return self.is_late or (self.has_begun and self.running == 0)


@dataclass(frozen=True)
class Draining:
    """ASGI middleware: counts what is answered, and refuses all but the watchers' routes once the drain has begun."""

    app: ASGIApp
    drain: Drain
    metrics: Metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http" or scope["path"] in WATCHED:
            await self.app(scope, receive, send)
            return
        if self.drain.has_begun:
            refusal = ShuttingDown()
            self.metrics.refused.labels(refusal.code).inc()
            reply = errors.response(refusal)
            reply.headers["connection"] = "close"  # the next try should reach another server
            await reply(scope, receive, send)
            return
        self.drain.running += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.drain.running -= 1
