import json
import socket
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse

import pytest

from server import loading


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with loading.listen("127.0.0.1", 0) as made:
        yield made


def ask(listener: socket.socket, method: str, path: str, body: bytes | None = None) -> tuple[HTTPResponse, bytes]:
    connection = HTTPConnection(*listener.getsockname(), timeout=10)
    connection.request(method, path, body)
    reply = connection.getresponse()
    return reply, reply.read()


def test_the_process_is_up_and_not_ready(listener: socket.socket) -> None:
    with loading.answering(listener) as meanwhile:
        for path in ("/healthz", "/health"):
            reply, data = ask(listener, "GET", path)
            assert (reply.status, json.loads(data)) == (200, {"status": "ok"})
        reply, data = ask(listener, "GET", "/readyz?store=1")
        assert (reply.status, json.loads(data)) == (503, {"status": "loading", "model": False, "store": False})
        meanwhile.store = True
        assert json.loads(ask(listener, "GET", "/readyz")[1])["store"] is True


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/generate", b"{}"),
        ("POST", "/v1/prefixes", b"x" * 300_000),
        ("GET", "/v1/models", None),
        ("DELETE", "/v1/prefixes/a", None),
        ("PUT", "/v1/prefixes/a/content", b"x"),
        ("PATCH", "/v1/prefixes/a", b"{}"),
        ("OPTIONS", "/generate", None),
    ],
)
def test_everybody_else_is_told_to_come_back(
    listener: socket.socket, method: str, path: str, body: bytes | None
) -> None:
    with loading.answering(listener):
        reply, data = ask(listener, method, path, body)
    error = json.loads(data)["error"]
    assert (reply.status, error["code"], set(error)) == (503, "loading", {"message", "type", "param", "code"})
    assert (reply.headers["retry-after"], reply.headers["connection"]) == ("1", "close")
    assert reply.headers["x-request-id"]


def test_head_has_no_body(listener: socket.socket) -> None:
    with loading.answering(listener):
        reply, data = ask(listener, "HEAD", "/readyz")
    assert (reply.status, data) == (503, b"")


def test_who_says_nothing_or_no_http_holds_up_nobody(listener: socket.socket) -> None:
    with loading.answering(listener), socket.create_connection(listener.getsockname()) as silent:
        with socket.create_connection(listener.getsockname()) as odd:
            odd.sendall(b"\x16\x03\x01 no http\r\n\r\n")
        begun = time.monotonic()
        assert ask(listener, "GET", "/healthz")[0].status == 200
        assert time.monotonic() - begun < 3
        silent.sendall(b"GET")


def test_who_comes_when_it_ends_is_answered_by_what_comes_after(listener: socket.socket) -> None:
    with loading.answering(listener):
        pass
    assert "loading" not in [thread.name for thread in threading.enumerate()]
    with socket.create_connection(listener.getsockname(), timeout=10) as waiting:
        accepted, _ = listener.accept()
        with accepted:
            accepted.sendall(b"later")
            assert waiting.recv(5) == b"later"
