"""One request on its way through the front: its body, the replica that is asked, the reply as it comes."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx
import structlog
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from prefix_store.errors import AntefixError, Loading, OutOfMemory, RequestTimeout, ShuttingDown
from server.api import errors, sse
from server.api.exchange import ID_HEADER
from server.api.limits import JSON_BYTES, SILENCE_SECONDS
from server.cluster.ranking import NAMED_BY

if TYPE_CHECKING:
    from server.cluster.front import Front

TRIES = 3
# What a replica refuses and another one may not; the store, say, is away for all of them.
ELSEWHERE = {ShuttingDown.code, Loading.code, OutOfMemory.code}
BY_THE_HOP = {b"connection", b"expect", b"keep-alive", b"transfer-encoding", b"te", b"trailer", b"upgrade", b"date"}
_log = structlog.get_logger("antefix.cluster")


class ReplicaLost(ShuttingDown):
    """The server that had this request is gone; another one, or a later one, answers."""

    code = "replica_lost"


class Relay:
    """One request and its reply. Until something of the reply is out, another replica may be asked."""

    def __init__(self, front: Front, scope: Scope, receive: Receive, send: Send) -> None:
        self._front = front
        self._scope = scope
        self._receive = receive
        self._send = send
        self._generates = scope["method"] == "POST" and scope["path"] in NAMED_BY
        self._has_begun = self._is_stream = False

    async def serve(self) -> None:
        """Until the reply is out, or the client has left."""
        try:
            if self._generates or self._scope["method"] in ("GET", "HEAD"):
                body = await self._body() if self._generates else b""
                await sse.unless_gone(self._receive, self._answer(body))
            else:
                await self._answer(None)
        except AntefixError as error:
            await self._refuse(error)
        except asyncio.CancelledError:  # the front ends, and has waited
            await self._refuse(ShuttingDown())
        except ClientDisconnect:
            pass
        except Exception:
            if self._has_begun:
                raise  # half a reply is out: only closing the connection can say so
            _log.exception("unhandled")
            await self._refuse(errors.unforeseen())

    async def _answer(self, body: bytes | None) -> None:
        avoided: set[str] = set()
        while not await self._try(body, avoided):
            pass

    async def _body(self) -> bytes:
        """The body as far as the server will read it: one byte too many is enough for it to refuse."""
        read = bytearray()
        async for piece in self._pieces():
            read += piece
            if len(read) > JSON_BYTES:
                break
        return bytes(read[: JSON_BYTES + 1])

    async def _pieces(self) -> AsyncIterator[bytes]:
        more = True
        while more:
            try:
                message = await asyncio.wait_for(self._receive(), SILENCE_SECONDS)
            except TimeoutError:
                raise RequestTimeout(f"nothing of the request's body came for {SILENCE_SECONDS:g} seconds") from None
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            yield message.get("body", b"")
            more = message.get("more_body", False)

    async def _try(self, body: bytes | None, avoided: set[str]) -> bool:
        """Whether the reply went out. False: another replica is to be asked, none of those `avoided` by now.

        Without a body it is the client's own that is passed on, as it comes, and so once.
        """
        async with self._front.replica(self._scope["path"], body or b"", avoided) as (name, address):
            avoided.add(name)
            is_last = len(avoided) == TRIES
            hop = BY_THE_HOP if body is None else {*BY_THE_HOP, b"content-length"}  # of a read body it is told anew
            headers = [pair for pair in self._scope["headers"] if pair[0] not in hop]
            url = httpx.URL(address).copy_with(raw_path=_target(self._scope))
            content = self._pieces() if body is None else body
            try:
                async with self._front.client.stream(
                    self._scope["method"], url, headers=headers, content=content
                ) as reply:
                    may_retry = body is not None and not is_last and self._front.has_other(avoided)
                    return await self._pass_on(reply, name, may_retry=may_retry)
            except httpx.TransportError as error:
                if self._has_begun and not self._is_stream:
                    raise
                if self._has_begun or is_last or not (body is not None or isinstance(error, httpx.ConnectError)):
                    raise ReplicaLost(
                        "the server that had this request is gone; look what it did, and repeat it"
                    ) from None
                return False

    async def _pass_on(self, reply: httpx.Response, name: str, *, may_retry: bool) -> bool:
        is_stream = reply.headers.get("content-type", "").startswith("text/event-stream")
        pieces = reply.aiter_raw()
        first = await anext(pieces, b"")
        if reply.status_code == 503 or (self._generates and not is_stream):
            first += b"".join([piece async for piece in pieces])
        if reply.status_code == 503 and may_retry and _code(first) in ELSEWHERE:
            return False
        headers = [pair for pair in reply.headers.raw if pair[0].lower() not in BY_THE_HOP]
        headers.append((b"x-antefix-replica", name.encode()))
        self._has_begun, self._is_stream = True, is_stream
        await self._send({"type": "http.response.start", "status": reply.status_code, "headers": headers})
        await self._write(first)
        async for piece in pieces:
            await self._write(piece)
        await self._write(b"", more=False)
        return True

    async def _write(self, piece: bytes, *, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": piece, "more_body": more})

    async def _refuse(self, error: AntefixError) -> None:
        if self._is_stream:
            await self._write(sse.event(errors.body(error)) + sse.DONE, more=False)
        elif not self._has_begun:
            reply = errors.response(error)
            reply.headers[ID_HEADER] = uuid.uuid4().hex
            await reply(self._scope, self._receive, self._send)


def _code(body: bytes) -> Any:
    with suppress(ValueError, KeyError, TypeError):
        return json.loads(body)["error"]["code"]
    return None


def _target(scope: Scope) -> bytes:
    path: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
    return path + (b"?" + scope["query_string"] if scope["query_string"] else b"")
