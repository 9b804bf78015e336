"""One HTTP exchange from outside: its id, its log line, and the answer to what nobody foresaw."""

from __future__ import annotations

import re
import time
import uuid
from dataclasses import dataclass

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prefix_store.errors import NotFound
from server.api import errors
from server.metrics import Metrics

ID_HEADER = "x-request-id"
ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
CLIENT_LEFT = 499  # nginx's number; nobody receives it
_log = structlog.get_logger("antefix.access")


class RouteNotFound(NotFound):
    """No route of ours."""

    code = errors.STATUS_CODES[404]


@dataclass(frozen=True)
class Exchange:
    """ASGI middleware, the outermost: every reply has an id, and no reply has a traceback.

    HEAD is served as GET, and answered without the body (RFC 9110, 9.3.2).
    """

    app: ASGIApp
    metrics: Metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(scope)
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        method = scope["method"]
        if method == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._serve(method, scope, receive, _Reply(send, request_id, scope, has_body=method != "HEAD"))

    async def _serve(self, method: str, scope: Scope, receive: Receive, reply: _Reply) -> None:
        begun = time.monotonic()
        try:
            if scope["path"].isprintable():
                await self.app(scope, receive, reply)
            else:  # the router would take a path with a newline behind it for the path without
                self.metrics.refused.labels(RouteNotFound.code).inc()
                await errors.response(RouteNotFound("there is no such route"))(scope, receive, reply)
        except ClientDisconnect:
            reply.status = CLIENT_LEFT
        except Exception:
            _log.exception("unhandled")
            if reply.status != 0:
                raise  # half a reply is out: only closing the connection can say so
            await errors.response(errors.unforeseen())(scope, receive, reply)
        finally:
            self._record(method, scope, reply.status or CLIENT_LEFT, time.monotonic() - begun)

    def _record(self, method: str, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "none")
        self.metrics.responses.labels(route, str(status)).inc()
        _log.info("request", method=method, route=route, status=status, ms=round(1000 * seconds, 1))


class _Reply:
    """The sending side: adds the id and what is left of the rates, remembers the status (0 until it is known)."""

    def __init__(self, send: Send, request_id: str, scope: Scope, *, has_body: bool) -> None:
        self._send = send
        self._id = request_id
        self._scope = scope
        self._has_body = has_body
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers[ID_HEADER] = self._id
            left = self._scope.get("state", {}).get("rate_headers")  # known once it is known who asks
            headers.update(await left() if left is not None else {})
        elif not self._has_body:
            message = {**message, "body": b""}
        await self._send(message)


def _request_id(scope: Scope) -> str:
    """The caller's own id where it is fit for logs and headers, else a new one."""
    offered = Headers(scope=scope).get(ID_HEADER, "")
    return offered if ID.fullmatch(offered) else uuid.uuid4().hex
