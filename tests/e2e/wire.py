"""HTTP by hand, for what no client library would send."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from tests.e2e.processes import Running

JSON = "application/json"
SECONDS = 60.0


@dataclass(frozen=True)
class Reply:
    """What came back, as far as it came."""

    status: int
    head: bytes
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def request(method: str, path: str, headers: Mapping[str, str] | None = None, *, close: bool = True) -> bytes:
    """The head of a request."""
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: 127.0.0.1",
        *(f"{name}: {value}" for name, value in (headers or {}).items()),
    ]
    return "\r\n".join([*lines, *(["Connection: close"] if close else []), "", ""]).encode("latin-1")


def posting(path: str, body: bytes, content_type: str = JSON) -> bytes:
    """A whole POST."""
    return request("POST", path, {"Content-Type": content_type, "Content-Length": str(len(body))}) + body


@contextmanager
def connected(server: Running, *, buffer: int | None = None) -> Iterator[socket.socket]:
    """A connection; `buffer` is how many bytes the kernel may hold for a reader that does not read."""
    with socket.socket() as made:
        if buffer is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        made.settimeout(SECONDS)
        made.connect((server.client.base_url.host, server.client.base_url.port))
        yield made


def reset(connection: socket.socket) -> None:
    """Closes it as a process that dies does: with a reset, whatever is under way."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def send(server: Running, pieces: bytes | Iterable[bytes]) -> Reply:
    """Sends until all is sent or the server has had enough, and reads the one reply."""
    with connected(server) as connection:
        with suppress(OSError):
            for piece in [pieces] if isinstance(pieces, bytes) else pieces:
                connection.sendall(piece)
        received = bytearray()
        with suppress(OSError):  # a server that closes on a sender resets; what it said came before
            while piece := connection.recv(1 << 16):
                received += piece
    head, _, body = bytes(received).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 "), received[:200]
    return Reply(int(head.split(b" ", 2)[1]), head, body)
