"""One request on its way through the front: its body, the replica that is asked, the reply as it comes."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import quote

import httpx
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from prefix_store.errors import AntefixError, RequestTimeout, ShuttingDown
from server.api import errors, sse
from server.api.limits import JSON_BYTES, SILENCE_SECONDS
from server.cluster.ranking import NAMED_BY

TRIES = 3
BY_THE_HOP = {"connection", "expect", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "proxy-connection"}
BY_RAY = {b"date", b"x-request-id"}  # of replies; the id is the one that the replica was given


class ReplicaLost(ShuttingDown):
    """The server that had this request is gone; another one, or a later one, answers."""

    code = "replica_lost"


class Front(Protocol):
    """What finds replicas."""

    client: httpx.AsyncClient

    async def key(self, request: Request, body: bytes) -> str | None:
        """What the request is about."""

    def replica(self, key: str | None, avoided: list[str]) -> AbstractAsyncContextManager[dict[str, str]]:
        """A replica's name and url."""


@dataclass
class Relay(Response):
    """One request and its reply. Until something of the reply is out, another replica may be asked."""

    front: Front
    request: Request
    begun: bool = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves the reply."""
        avoided: list[str] = []
        try:
            body = await self._body() if self._generates else b"" if self.request.method in ("GET", "HEAD") else None
            key = await self.front.key(self.request, body or b"")
            while not await self._try(body, key, avoided, send):
                pass
        except AntefixError as error:
            await errors.response(error)(scope, receive, send)

    @property
    def _generates(self) -> bool:
        return self.request.method == "POST" and self.request.url.path in NAMED_BY

    async def _body(self) -> bytes:
        """The body as far as the server will read it: one byte too many is enough for it to refuse."""
        read = bytearray()
        try:
            async with asyncio.timeout(SILENCE_SECONDS):
                async for piece in self.request.stream():
                    read += piece
                    if len(read) > JSON_BYTES:
                        break
        except TimeoutError:
            raise RequestTimeout(f"the request's body did not come within {SILENCE_SECONDS:g} seconds") from None
        return bytes(read[: JSON_BYTES + 1])

    async def _try(self, body: bytes | None, key: str | None, avoided: list[str], send: Send) -> bool:
        """Whether the reply went out. False: another replica is to be asked. Raises ReplicaLost, ShuttingDown.

        Without a body it is the client's own that is passed on, as it comes, and so once.
        """
        is_last = len(avoided) + 1 == TRIES
        async with self.front.replica(key, avoided) as place:
            url = httpx.URL(place["url"]).copy_with(raw_path=_target(self.request.scope))
            content = body if body is not None else self.request.stream()
            headers = [pair for pair in self.request.headers.raw if _goes_on(pair[0], is_read=body is not None)]
            try:
                async with self.front.client.stream(
                    self.request.method, url, headers=headers, content=content
                ) as reply:
                    if reply.status_code == 503 and body is not None and not is_last:
                        avoided.append(place["name"])
                        return False
                    await self._pass_on(reply, send, place["name"])
            except httpx.TransportError as error:
                if self.begun:
                    raise  # half a reply is out: only closing the connection can say so
                if is_last or not (body is not None or isinstance(error, httpx.ConnectError)):
                    raise ReplicaLost(
                        "the server that had this request is gone; look what it did, then repeat"
                    ) from None
                avoided.append(place["name"])
                return False
        return True

    async def _pass_on(self, reply: httpx.Response, send: Send, replica: str) -> None:
        streams = reply.headers.get("content-type", "").startswith("text/event-stream")
        pieces = reply.aiter_raw()
        first = await anext(pieces, b"")
        if self._generates and not streams:
            first += b"".join([piece async for piece in pieces])
        headers = [pair for pair in reply.headers.raw if _goes_on(pair[0]) and pair[0].lower() not in BY_RAY]
        headers.append((b"x-antefix-replica", replica.encode()))
        await send({"type": "http.response.start", "status": reply.status_code, "headers": headers})
        self.begun = True
        await send({"type": "http.response.body", "body": first, "more_body": True})
        try:
            async for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except httpx.TransportError:
            if not streams:
                raise
            lost = ReplicaLost("the server that wrote this stream is gone; begin again, and another one answers")
            last = sse.event(errors.body(lost)) + sse.DONE
            await send({"type": "http.response.body", "body": last, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _goes_on(header: bytes, *, is_read: bool = False) -> bool:
    """Whether a header is for the other end; the length of a body that was read is told anew."""
    name = header.decode("latin-1").lower()
    return name not in BY_THE_HOP and not (is_read and name == "content-length")


def _target(scope: Scope) -> bytes:
    path: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
    return path + (b"?" + scope["query_string"] if scope["query_string"] else b"")
