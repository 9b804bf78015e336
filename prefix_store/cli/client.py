"""HTTP to a server: what the commands about work stand on. A failure is one line on stderr and exit status 1."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn
from urllib.parse import quote

import httpx

from prefix_store.cli.secret import secret
from prefix_store.cli.terminal import fail, transfer
from prefix_store.errors import ContextLengthExceeded, InvalidName
from prefix_store.prefix import PrefixRef, check_name
from prefix_store.tenants import DEFAULT_TENANT

DEFAULT_URL = "http://127.0.0.1:8000"
# No limit on reading, and none on connections: a generation may wait in the queue for long, and many may at a time.
TIMEOUT, LIMITS = httpx.Timeout(30.0, read=None, pool=None), httpx.Limits(max_connections=None)
CHUNK = 1 << 16
DATA = b"data: "
NOT_ANTEFIX = "the server does not answer as an antefix server"
LARGEST = (1 << 63) - 1  # of a count; JSON knows numbers that no arithmetic with seconds can hold
NO_ROUTE, BUSY = ("route_not_found", "method_not_allowed"), (429, 503)


class Failure(Exception):
    """Why a command cannot go on, for people to read. `connect` ends the command with it."""


class Busy(Failure):
    """The server has no room now; it may have in `seconds`."""

    def __init__(self, message: str, seconds: int) -> None:
        super().__init__(message)
        self.seconds = seconds


class NoRoom(Failure):
    """What was asked does not fit into the model's context."""


class Reply(dict[str, Any]):
    """A JSON object of a server; one that lacks what it should have comes from another kind of server."""

    def __missing__(self, key: str) -> NoReturn:
        raise Failure(f"{NOT_ANTEFIX}: no {key!r} in its reply")


class Client:
    """A server, as its routes; replies are the JSON they hold. Every method raises Failure."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        self._url = str(http.base_url).rstrip("/")

    def get(self, path: str, **query: Any) -> dict[str, Any]:
        """GET; parameters that are None are left out."""
        return self._json("GET", path, params={name: value for name, value in query.items() if value is not None})

    def post(self, path: str, **request: Any) -> dict[str, Any]:
        """POST with httpx's own arguments: `json`, `data`, `files`. What takes long to send has a bar."""
        return self._json("POST", path, **request)

    def put(self, path: str, **request: Any) -> dict[str, Any]:
        """PUT with httpx's own arguments."""
        return self._json("PUT", path, **request)

    def patch(self, path: str, **request: Any) -> dict[str, Any]:
        """PATCH with httpx's own arguments."""
        return self._json("PATCH", path, **request)

    def delete(self, path: str, **request: Any) -> dict[str, Any]:
        """DELETE with httpx's own arguments."""
        return self._json("DELETE", path, **request)

    def download(self, path: str, **query: Any) -> bytes:
        """The reply's bytes. What takes long to come has a bar."""
        chunks = []
        with self._open("GET", path, params=query) as reply, transfer("receiving", _length(reply)) as tell:
            for chunk in reply.iter_bytes():
                chunks.append(chunk)
                tell(len(chunk))
        return b"".join(chunks)

    def pages(self, path: str, *keys: str, after: Any = None, **query: Any) -> Iterator[dict[str, Any]]:
        """Every object of a list behind `after`, page by page. `keys`: the fields that its order goes by, else `id`."""
        while True:
            page = self.get(path, after=after, **query)
            yield from page["data"]
            if not page["has_more"]:
                return
            last = page["data"][-1]
            after = "/".join(str(last[key]) for key in keys or ("id",))

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a streamed reply, to its end, which only a reason to finish makes one."""
        finished = False
        with self._open("POST", path, json=body) as reply:
            for line in _lines(reply):
                if line == DATA + b"[DONE]":
                    if finished:
                        return
                    break
                if line.startswith(DATA):
                    event = _event(self._read(line.removeprefix(DATA)))
                    finished = finished or event["finish_reason"] is not None
                    yield event
        raise Failure("the answer ended before its end: the server, or something on the way, closed the connection")

    def _json(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        with self._open(method, path, **request) as reply:
            return self._read(reply.read())

    def _read(self, text: bytes) -> dict[str, Any]:
        try:
            found = json.loads(text, object_hook=Reply)
        except (ValueError, RecursionError):  # no JSON, or thousands of digits, or of brackets
            found = None
        if not isinstance(found, dict):
            raise Failure(f"{self._url} does not answer as an antefix server: what came is no JSON object")
        return found

    @contextmanager
    def _open(self, method: str, path: str, **request: Any) -> Iterator[httpx.Response]:
        """A reply that has begun and is no error."""
        try:
            built = self._http.build_request(method, path, **request)
        except (ValueError, httpx.InvalidURL) as error:  # the latter where a server's id is part of the path
            raise Failure(_unsendable(request.get("json") or {}, error)) from error
        try:
            reply = self._send(built)
            try:
                if not reply.is_success:
                    reply.read()
                    raise self._failure(reply)
                yield reply
            finally:
                reply.close()
        except httpx.HTTPError as error:
            raise Failure(self._unreachable(error)) from error

    def _send(self, request: httpx.Request) -> httpx.Response:
        size = int(request.headers.get("content-length", 0))
        if size <= CHUNK:
            return self._http.send(request, stream=True)
        with transfer("sending", size) as tell:
            request.stream = _Told(request.stream, tell)
            return self._http.send(request, stream=True)

    def _failure(self, reply: httpx.Response) -> Failure:
        """What the server said, and what to do about it where that is known."""
        try:
            error = reply.json()["error"]
            message, code = str(error["message"]), error.get("code")
        except (ValueError, KeyError, TypeError, RecursionError):
            message, code = "", NO_ROUTE[0]
        wait = reply.headers.get("retry-after", "")
        said = self._said(reply, message, code)
        if reply.status_code in BUSY and wait.isdigit():
            return Busy(said, min(int(wait), 3600))
        return NoRoom(said) if code == ContextLengthExceeded.code else Failure(said)

    def _said(self, reply: httpx.Response, message: str, code: object) -> str:
        if code in NO_ROUTE:
            to = f" to {reply.headers['location']}" if "location" in reply.headers else ""
            said = f"{self._url} answered {reply.status_code} {reply.reason_phrase}{to}"
            from_proxy = reply.status_code in (502, 503, 504)
            return said if from_proxy else f"{said}; is ANTEFIX_URL the address of an antefix server?"
        return f"{message}; it is taken from ANTEFIX_API_KEY" if reply.status_code == 401 else message

    def _unreachable(self, error: httpx.HTTPError) -> str:
        why = re.sub(r"\[Errno -?\d+\] ", "", str(error)) or type(error).__name__
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return f"no server answers at {self._url} ({why}); start one with `antefix serve`, or set ANTEFIX_URL"
        return f"the connection to {self._url} broke: {why}"


class _Told(httpx.SyncByteStream):
    """A request's body that tells of every chunk it gave."""

    def __init__(self, stream: Any, tell: Callable[[int], None]) -> None:
        self._stream, self._tell = stream, tell

    def __iter__(self) -> Iterator[bytes]:
        for whole in self._stream:
            for start in range(0, len(whole), CHUNK):
                yield (chunk := whole[start : start + CHUNK])
                self._tell(len(chunk))


@contextmanager
def connect() -> Iterator[Client]:
    """The server that ANTEFIX_URL names, with ANTEFIX_API_KEY."""
    with _http() as http:
        try:
            yield Client(http)
        except Failure as failure:
            fail(str(failure))


def checked(name: str) -> str:
    """A name that a prefix may have. Ends the command for another, which would make another path."""
    try:
        return check_name(name)
    except InvalidName as error:
        fail(error.message)


def reference(ref: str) -> str:
    """Where a prefix is over HTTP. What is no reference is refused here, for `..` would lead elsewhere."""
    try:
        PrefixRef.parse(ref, DEFAULT_TENANT)
    except InvalidName as error:
        fail(error.message)
    return f"/v1/prefixes/{quote(ref)}"


def _http() -> httpx.Client:
    key = _key()
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        return httpx.Client(base_url=_url(), headers=headers, timeout=TIMEOUT, limits=LIMITS)
    except (ValueError, ImportError) as error:
        fail(f"the proxy that the environment names cannot be used: {error}")


def _url() -> httpx.URL:
    text = os.environ.get("ANTEFIX_URL") or DEFAULT_URL
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        url = httpx.URL()
    is_address = url.scheme in ("http", "https") and url.host and (url.port or 0) < 1 << 16
    if not is_address or url.query or url.fragment:
        fail(f"ANTEFIX_URL must be a server's address such as {DEFAULT_URL}, got {text!r}")
    return url


def _key() -> str:
    key = secret("ANTEFIX_API_KEY").strip()
    if not re.fullmatch(r"[!-~]*", key):
        fail("ANTEFIX_API_KEY must be one key as `antefix key new` prints it: afx_…")
    return key


def _lines(reply: httpx.Response) -> Iterator[bytes]:
    """What stands before each `\\n`. httpx would also split at letters that a text may hold, U+2028 and U+0085."""
    rest = b""
    for chunk in reply.iter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines


def _event(event: dict[str, Any]) -> dict[str, Any]:
    """The event, once what the commands count on is of its type. Raises Failure."""
    if "error" in event:
        raise Failure(_complaint(event["error"]))
    _demand(isinstance(event["text"], str), "'text' is no string")
    _demand(isinstance(event["finish_reason"], str | None), "'finish_reason' is no string")
    if event["finish_reason"] is not None:
        usage, prefix = event["usage"], event["prefix"]
        _demand(isinstance(usage, dict) and _is_count(usage["completion_tokens"]), "'completion_tokens' is no count")
        known = prefix is None or (isinstance(prefix, dict) and _is_count(prefix["version"]))
        _demand(known, "'prefix' has no version that is a number")
    return event


def _demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Failure(f"{NOT_ANTEFIX}: {otherwise}")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= LARGEST  # not isinstance: True is no number here


def _complaint(error: object) -> str:
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) and message else "the server failed and does not say why"


def _length(reply: httpx.Response) -> int | None:
    length = reply.headers.get("content-length", "")
    return int(length) if length.isdigit() else None


def _unsendable(body: dict[str, Any], error: Exception) -> str:
    """Which field JSON or UTF-8 has no word for."""
    for name, value in body.items():
        if isinstance(value, float) and not math.isfinite(value):
            return f"{name} must be a finite number, got {value}"
        if isinstance(value, str) and value != value.encode(errors="replace").decode():
            return f"{name} is not valid text: it holds bytes that are no UTF-8"
    return f"the request cannot be sent: {error}"
