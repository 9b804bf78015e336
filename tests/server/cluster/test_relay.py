"""The relay between a client that is played here and servers that answer by the byte."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import pytest
from starlette.types import Message

from server.api.drain import Drain
from server.api.limits import JSON_BYTES
from server.cluster.front import Front
from server.cluster.relay import TRIES

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nx-request-id: 7\r\ncontent-type: application/json\r\n\r\n{}"
WRONG = b"HTTP/1.1 404 Not Found\r\ncontent-length: 5\r\n\r\nwrong"
CUT = b"HTTP/1.1 200 OK\r\ncontent-length: 20\r\ncontent-type: application/json\r\n\r\n{"
STREAM = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-type: text/event-stream\r\n\r\n"
BEGUN = STREAM + b"8\r\ndata: 1\n\r\n"


def refusing(code: str) -> bytes:
    body = json.dumps({"error": {"message": "no", "type": "server_error", "param": None, "code": code}}).encode()
    return b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: %d\r\nretry-after: 1\r\n\r\n%s" % (len(body), body)


STOPPING, FULL, STORELESS = map(refusing, ("shutting_down", "out_of_memory", "store_unavailable"))


@dataclass
class Servers:
    """Each answers every request with the same bytes, and closes; they are asked in their order."""

    answers: Sequence[bytes | None]
    urls: list[str] = field(default_factory=list)
    heard: list[tuple[int, bytes]] = field(default_factory=list)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for number, answer in enumerate(self.answers):
                listener = await asyncio.start_server(partial(self._serve, number, answer), "127.0.0.1")
                self.urls.append("http://127.0.0.1:{1}".format(*listener.sockets[0].getsockname()))
                if answer is None:  # nobody listens there
                    listener.close()
                else:
                    await stack.enter_async_context(listener)
            yield

    async def _serve(
        self, number: int, answer: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head.lower())
        self.heard.append((number, head + await reader.readexactly(int(length[1]) if length else 0)))
        writer.write(answer)
        await writer.drain()
        writer.close()


async def ask(
    answers: Sequence[bytes | None], path: str = "/generate", method: str = "POST", body: bytes = b"{}"
) -> tuple[int, dict[str, str], bytes, list[tuple[int, bytes]]]:
    """What a client gets: status, headers, body; and what the servers heard."""
    sent: list[Message] = []
    pieces = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return pieces.pop(0) if pieces else await asyncio.Future()

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"host", b"here"), (b"content-length", str(len(body)).encode()), (b"te", b"trailers")]
    scope = {"type": "http", "method": method, "path": path, "query_string": b"a=1", "headers": headers}
    front, servers = Front(lambda requests: {}, Drain()), Servers(answers)
    async with front.client, servers.listening():
        front.places = {str(number): url for number, url in enumerate(servers.urls)}
        await front(scope, receive, send)
    start = sent[0]
    names = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], names, b"".join(message.get("body", b"") for message in sent[1:]), servers.heard


def code(body: bytes) -> str:
    return json.loads(body)["error"]["code"]


@pytest.mark.anyio
async def test_a_reply_goes_through_with_its_replica_and_without_what_is_of_the_hop() -> None:
    status, headers, body, heard = await ask([OK])
    assert (status, body) == (200, b"{}")
    assert headers.pop("x-antefix-replica") == "0"
    assert headers == {"content-length": "2", "content-type": "application/json", "x-request-id": "7"}
    head, _, content = heard[0][1].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /generate?a=1 HTTP/1.1\r\nhost: here\r\n")
    assert b"te:" not in head
    assert content == b"{}"


@pytest.mark.anyio
@pytest.mark.parametrize(
    "lost",
    [b"", STOPPING, FULL, CUT, STREAM, None],
    ids=["reset", "stopping", "full", "half a reply", "no token", "gone"],
)
async def test_what_has_sent_nothing_is_asked_of_another(lost: bytes | None) -> None:
    status, headers, body, heard = await ask([lost, OK])
    assert (status, body, headers["x-antefix-replica"]) == (200, b"{}", "1")
    assert [content.rpartition(b"\r\n")[2] for _, content in heard] == [b"{}"] * len(heard)


@pytest.mark.anyio
async def test_a_get_is_asked_again_and_an_error_of_the_request_is_not() -> None:
    assert (await ask([b"", OK], "/v1/models", "GET", b""))[0] == 200
    status, _, body, heard = await ask([WRONG, OK])
    assert (status, body, len(heard)) == (404, b"wrong", 1)


@pytest.mark.anyio
async def test_after_three_tries_the_client_is_told_to_repeat() -> None:
    status, headers, body, heard = await ask([b""] * (TRIES + 1))
    assert (status, code(body), headers["retry-after"]) == (503, "replica_lost", "1")
    assert len(heard) == TRIES
    status, _, body, heard = await ask([STOPPING] * (TRIES + 1))
    assert (status, code(body), len(heard)) == (503, "shutting_down", TRIES)


@pytest.mark.anyio
async def test_what_no_other_replica_can_help_with_is_passed_on_at_once() -> None:
    status, _, body, heard = await ask([STORELESS, OK])
    assert (status, code(body), len(heard)) == (503, "store_unavailable", 1)
    status, _, body, heard = await ask([FULL])
    assert (status, code(body), len(heard)) == (503, "out_of_memory", 1)


@pytest.mark.anyio
async def test_what_may_have_been_done_is_not_done_twice_unless_nobody_was_there() -> None:
    status, _, body, heard = await ask([b"", OK], "/v1/prefixes", body=b"file")
    assert (status, code(body), len(heard)) == (503, "replica_lost", 1)
    assert (await ask([None, OK], "/v1/prefixes", body=b"file"))[0] == 200


@pytest.mark.anyio
async def test_a_stream_that_has_begun_ends_with_an_error_and_goes_nowhere_else() -> None:
    status, _, body, heard = await ask([BEGUN, OK])
    assert (status, len(heard)) == (200, 1)
    first, error, done = body.split(b"data: ")[1:]
    assert (first, code(error), done) == (b"1\n", "replica_lost", b"[DONE]\n\n")


@pytest.mark.anyio
async def test_of_too_large_a_body_the_server_gets_one_byte_too_many() -> None:
    _, _, _, heard = await ask([WRONG], body=b"x" * (JSON_BYTES + 100))
    assert f"content-length: {JSON_BYTES + 1}".encode() in heard[0][1].lower()
