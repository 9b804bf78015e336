"""What HTTP reaches before the replicas: where they are, how many requests each has, who gets the next one."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx
import structlog
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from prefix_store.errors import Loading, ShuttingDown
from server.api import errors
from server.api.drain import WATCHED, Drain
from server.api.exchange import ID_HEADER
from server.cluster.ranking import Ranking, key_of
from server.cluster.relay import Relay
from server.loading import READY, UP

EXCHANGE_SECONDS, POLL_SECONDS = 0.5, 0.05
# A request for which there is no replica waits for one as long.
WAIT_SECONDS = 30.0
_log = structlog.get_logger("antefix.cluster")


class Front:
    """The application, and the loop beside it that asks the replicas where they are.

    `exchange` tells them how many requests each has, and returns addresses by name.
    """

    has_failed = False  # what it cannot reach it asks again

    def __init__(self, exchange: Callable[[dict[str, int]], dict[str, str]], drain: Drain) -> None:
        self.places: dict[str, str] = {}
        # without a bound on the wait: a long answer sends nothing until it is whole, and a server that hangs is killed
        timeout, limits = httpx.Timeout(None, connect=5.0), httpx.Limits(max_connections=None)
        self.client = httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False)
        self._exchange = exchange
        self._drain = drain
        self._requests: Counter[str] = Counter()
        self._ranking = Ranking()
        self._stopped = threading.Event()

    def run(self) -> None:
        """Until `stop`, in a thread of its own."""
        while not self._stopped.is_set():
            try:
                self.places = self._exchange(dict(self._requests))
            except Exception as error:  # Ray's are many; and whether a server is gone, its requests notice too
                _log.warning("no word of the replicas", error=repr(error))
            self._stopped.wait(EXCHANGE_SECONDS)

    def stop(self) -> None:
        """Soon."""
        self._stopped.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] == "lifespan":
            for moment in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{moment}.complete"})
        elif scope["type"] == "http" and (reply := self._own(scope["path"])) is not None:
            reply.headers[ID_HEADER] = uuid.uuid4().hex
            await reply(scope, receive, send)
        elif scope["type"] == "http":
            self._drain.running += 1
            try:
                await Relay(self, scope, receive, send).serve()
            finally:
                self._drain.running -= 1

    def _own(self, path: str) -> Response | None:
        """What no replica is needed for."""
        if path in UP:
            return JSONResponse({"status": "ok"})
        stops = self._drain.has_begun
        if path == READY and (stops or not self.places):
            status = "stopping" if stops else "loading"
            return JSONResponse({"status": status, "model": stops, "store": True}, 503)
        if not stops or path in WATCHED:
            return None
        refusal = errors.response(ShuttingDown())
        refusal.headers["connection"] = "close"
        return refusal

    def has_other(self, avoided: set[str]) -> bool:
        """Whether there is a replica that is none of these."""
        return not self.places.keys() <= avoided

    @asynccontextmanager
    async def replica(self, path: str, body: bytes, avoided: set[str]) -> AsyncIterator[tuple[str, str]]:
        """A replica's name and address, none of those to avoid. Raises Loading if there is none for long."""
        until = time.monotonic() + WAIT_SECONDS
        while (places := self.places).keys() <= avoided:
            if time.monotonic() > until:
                raise Loading("no replica takes requests now; try again later")
            await asyncio.sleep(POLL_SECONDS)
        loads = {name: self._requests[name] for name in places}
        name = self._ranking.choose(key_of(path, body), loads, avoided)
        self._requests[name] += 1
        try:
            yield name, places[name]
        finally:
            self._requests[name] -= 1
