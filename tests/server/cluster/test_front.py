"""The front beside its replicas: what it answers itself, where it finds them, when it waits, and how it ends."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from starlette.types import Message

from server.api.drain import Drain
from server.cluster import front as fronts
from server.cluster import relay
from server.cluster.front import Front

Pieces = list[tuple[float, bytes | None]]  # when each comes, after the one before it; None for the client's leaving


async def ask(front: Front, path: str, pieces: Pieces | None = None) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of what it answers; status 0 for nothing."""
    sent: list[Message] = []
    method = "GET" if pieces is None else "POST"
    coming = iter([(0.0, b"")] if pieces is None else pieces)

    async def receive() -> Message:
        delay, piece = next(coming, (1e6, b""))
        await asyncio.sleep(delay)
        if piece is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": piece, "more_body": method == "POST" and piece != b"}"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": [(b"host", b"here")]}
    await front(scope, receive, send)
    if not sent:
        return 0, {}, None
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, json.loads(b"".join(message.get("body", b"") for message in sent[1:]))


def alone(seconds: float = 0.0) -> Front:
    return Front(lambda requests: {}, Drain(seconds))


@pytest.mark.anyio
async def test_it_is_up_and_not_ready_while_there_is_no_replica() -> None:
    status, headers, body = await ask(alone(), "/healthz")
    assert (status, body) == (200, {"status": "ok"})
    assert headers["x-request-id"]
    assert (await ask(alone(), "/readyz"))[0::2] == (503, {"status": "loading", "model": False, "store": True})


@pytest.mark.anyio
async def test_told_to_stop_it_refuses_what_is_new() -> None:
    drain = Drain(60)
    front = Front(lambda requests: {}, drain)
    front.places = {"a": "http://127.0.0.1:1"}
    drain.begin()
    assert (await ask(front, "/readyz"))[2]["status"] == "stopping"
    status, headers, body = await ask(front, "/v1/models")
    assert (status, body["error"]["code"], headers["connection"]) == (503, "shutting_down", "close")
    assert headers["x-request-id"]


@pytest.mark.anyio
async def test_a_request_waits_for_a_replica_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fronts, "WAIT_SECONDS", 0.2)
    status, headers, body = await ask(alone(), "/v1/models")
    assert (status, body["error"]["code"], headers["retry-after"]) == (503, "loading", "1")

    front = alone()
    asyncio.get_running_loop().call_later(0.1, lambda: setattr(front, "places", {"a": "http://127.0.0.1:1"}))
    async with front.replica("/generate", b"", set()) as found:
        assert found == ("a", "http://127.0.0.1:1")


@pytest.mark.anyio
async def test_a_request_counts_where_it_is_while_it_runs() -> None:
    told: list[dict[str, int]] = []
    front = Front(lambda requests: told.append(requests) or {"a": "http://a", "b": "http://b"}, Drain())
    thread = threading.Thread(target=front.run)
    thread.start()
    body = b'{"prefix_id": "x"}'
    async with AsyncExitStack() as stack:
        home, _ = await stack.enter_async_context(front.replica("/generate", body, set()))
        other, _ = await stack.enter_async_context(front.replica("/generate", body, {home}))
        await asyncio.sleep(2 * fronts.EXCHANGE_SECONDS)
    front.stop()
    await asyncio.to_thread(thread.join)
    assert {home, other} == {"a", "b"}
    assert told[-1] == {"a": 1, "b": 1}
    assert not +front._requests


def test_a_silent_ray_leaves_the_replicas_that_were_known(wait: Callable[[Callable[[], bool]], None]) -> None:
    answers = iter([{"a": "http://a"}])
    asked = []
    front = Front(lambda requests: asked.append(1) or next(answers), Drain())
    thread = threading.Thread(target=front.run)
    thread.start()
    wait(lambda: len(asked) > 1)
    front.stop()
    thread.join()
    assert front.places == {"a": "http://a"}


@pytest.fixture
def wait() -> Callable[[Callable[[], bool]], None]:
    def until(is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not is_so():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    return until


@pytest.mark.anyio
async def test_a_body_may_take_its_time_as_long_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(fronts, "WAIT_SECONDS", 0.0)
    slow: Pieces = [(0.1, b"{")] * 4 + [(0.1, b"}")]
    assert (await ask(alone(), "/generate", slow))[2]["error"]["code"] == "loading"
    silent: Pieces = [(0.0, b"{"), (5.0, b"}")]
    status, _, body = await ask(alone(), "/generate", silent)
    assert (status, body["error"]["code"]) == (408, "request_timeout")


async def hanging(front: Front) -> asyncio.Server:
    """A replica that answers nothing; the front knows it."""

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()  # until the other side closes
        writer.close()
        left.set()

    left = asyncio.Event()
    listener = await asyncio.start_server(hang, "127.0.0.1")
    listener.left = left  # type: ignore[attr-defined]
    front.places = {"a": "http://127.0.0.1:{1}".format(*listener.sockets[0].getsockname())}
    return listener


@pytest.mark.anyio
async def test_a_client_that_leaves_takes_its_request_along() -> None:
    front = alone()
    listener = await hanging(front)
    async with front.client, listener:
        assert (await ask(front, "/generate", [(0.0, b"}"), (0.1, None)]))[0] == 0
        await asyncio.wait_for(listener.left.wait(), 5)  # type: ignore[attr-defined]
    assert not +front._requests


@pytest.mark.anyio
async def test_what_still_runs_when_the_front_ends_is_told_so() -> None:
    front = alone()
    listener = await hanging(front)
    async with front.client, listener:
        asking = asyncio.create_task(ask(front, "/generate", [(0.0, b"}")]))
        await asyncio.sleep(0.1)
        asking.cancel()
        status, _, body = await asking
    assert (status, body["error"]["code"]) == (503, "shutting_down")
