"""Answers while the model loads: 200 to who asks whether the process is up, 503 `loading` to everybody else."""

from __future__ import annotations

import json
import socket
import socketserver
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prefix_store.errors import Loading
from server.api import errors
from server.api.exchange import ID_HEADER

UP = ("/healthz", "/health")
READY = "/readyz"
# What is read of a body, so that the answer comes before the connection is reset.
BODY_BYTES = 1 << 20
POLL_SECONDS = 0.05


def listen(host: str, port: int) -> socket.socket:
    """Takes the port, before the slow part of a start. Raises SystemExit if it cannot be had."""
    # by its protocol's number: asyncio sends small pieces at once, as a stream's tokens, on such sockets alone
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, proto=socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise SystemExit(f"antefix: cannot listen on {host}:{port}: {error.strerror or error}") from None
    return listener


@dataclass
class Meanwhile:
    """What is there already while the model loads."""

    store: bool = False


@contextmanager
def answering(listener: socket.socket) -> Iterator[Meanwhile]:
    """Answers on a bound socket until the block ends; the socket stays open, and who connects later waits."""
    listener.listen(128)
    server = _Server(listener)
    thread = threading.Thread(target=server.serve_forever, args=(POLL_SECONDS,), name="loading", daemon=True)
    thread.start()
    try:
        yield server.meanwhile
    finally:
        server.shutdown()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, listener: socket.socket) -> None:
        socketserver.BaseServer.__init__(self, listener.getsockname(), _Handler)
        self.socket = listener
        self.meanwhile = Meanwhile()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever left has no need of an answer."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 5.0  # a client that sends nothing holds no thread for longer

    def do_GET(self) -> None:
        """Any method."""
        path = self.path.partition("?")[0]
        if path in UP:
            self._reply(200, {"status": "ok"})
        elif path == READY:
            self._reply(503, {"status": "loading", "model": False, "store": self.server.meanwhile.store})
        else:
            self._read_body()
            self._reply(503, errors.body(Loading()))

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody asked for one."""

    def _read_body(self) -> None:
        length = self.headers.get("content-length", "")
        if length.isascii() and length.isdigit():
            self.rfile.read(min(int(length), BODY_BYTES))

    def _reply(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response_only(status)
        headers = {"content-type": "application/json", "content-length": str(len(data)), "connection": "close"}
        headers |= errors.HEADERS.get(status, {}) | {ID_HEADER: uuid.uuid4().hex}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
