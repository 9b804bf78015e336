"""How large a request body may be. Received bytes are counted, for a chunked body declares no length."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prefix_store.errors import PayloadTooLarge, RequestTimeout
from server.api import errors
from server.metrics import Metrics

MB = 1 << 20
JSON_BYTES = 4 * MB
TRAINING_BYTES = 64 * MB
# the form around an upload's file: boundaries, the id, a PEFT config, metadata
FORM_BYTES = 256 * 1024
# How long a body may pause on its way.
SILENCE_SECONDS = 60.0
UPLOAD_ROUTE = re.compile(r"/v1/prefixes/?")
CONTENT_ROUTE = re.compile(r"/v1/prefixes/[^/]+/content")
FILES_ROUTE = re.compile(r"/v1/files/?")
TRAIN_ROUTE = re.compile(r"/v1/prefixes/[^/]+/train")


@dataclass(frozen=True)
class BodyLimit:
    """ASGI middleware that refuses a body over its route's cap: at once if it is declared, else when it gets there."""

    app: ASGIApp
    upload_bytes: int
    metrics: Metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        cap = self._cap(scope["path"])
        declared = dict(scope["headers"]).get(b"content-length", b"")
        if declared.isdigit() and int(declared) > cap:
            self.metrics.refused.labels(PayloadTooLarge.code).inc()
            await errors.response(_too_large(cap))(scope, receive, send)
            return
        await self.app(scope, _counting(receive, cap), send)

    def _cap(self, path: str) -> int:
        if UPLOAD_ROUTE.fullmatch(path):
            return self.upload_bytes + FORM_BYTES
        if CONTENT_ROUTE.fullmatch(path):
            return self.upload_bytes
        if FILES_ROUTE.fullmatch(path):
            return TRAINING_BYTES + FORM_BYTES
        return TRAINING_BYTES if TRAIN_ROUTE.fullmatch(path) else JSON_BYTES


def _counting(receive: Receive, cap: int) -> Receive:
    received, is_whole = 0, False

    async def counted() -> Message:
        nonlocal received, is_whole
        # behind the body comes only that the client has left, which may take as long as it likes
        message = await receive() if is_whole else await _within(SILENCE_SECONDS, receive)
        is_whole = not message.get("more_body", False)
        received += len(message.get("body", b""))
        if received > cap:
            raise _too_large(cap)
        return message

    return counted


async def _within(seconds: float, receive: Receive) -> Message:
    try:
        return await asyncio.wait_for(receive(), seconds)
    except TimeoutError:
        raise RequestTimeout(f"the rest of the request's body did not come within {seconds:g} seconds") from None


def _too_large(cap: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the request body is larger than the {cap / MB:g} MB that this route takes")
