import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from server.api import sse

Receive = Callable[[], Awaitable[dict[str, Any]]]


def test_an_event_is_one_line_and_a_blank_one() -> None:
    assert sse.event({"text": "a\nb\r\n你"}) == 'data: {"text":"a\\nb\\r\\n你"}\n\n'.encode()


async def stays() -> dict[str, Any]:
    await asyncio.Event().wait()
    return {}


def leaves_after(event: asyncio.Event) -> Receive:
    async def receive() -> dict[str, Any]:
        await event.wait()
        return {"type": "http.disconnect"}

    return receive


@pytest.mark.anyio
async def test_work_that_ends_first_gives_its_result_or_its_error() -> None:
    async def work(error: Exception | None) -> str:
        if error is not None:
            raise error
        return "done"

    assert await sse.unless_gone(stays, work(None)) == "done"
    with pytest.raises(KeyError):
        await sse.unless_gone(stays, work(KeyError()))
    with pytest.raises(ClientDisconnect):
        await sse.unless_gone(stays, work(BrokenPipeError()))


@pytest.mark.anyio
async def test_a_client_that_leaves_ends_the_stream_and_what_feeds_it() -> None:
    sent, ends, left = [], [], asyncio.Event()

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            yield b"one"
            left.set()
            await asyncio.Event().wait()
        finally:
            ends.append("generator")

    async def send(message: Any) -> None:
        sent.append(message.get("body"))

    async def ended() -> None:
        ends.append("call")

    stream = sse.EventStream(events(), on_end=ended)
    with pytest.raises(ClientDisconnect):
        await stream({"type": "http"}, leaves_after(left), send)
    assert sent == [None, b"one"]
    assert ends == ["generator", "call"]


@pytest.mark.anyio
async def test_a_connection_that_is_gone_before_the_first_byte_ends_the_call_too() -> None:
    ends = []

    async def events() -> AsyncGenerator[bytes, None]:
        yield b"never"

    async def send(message: Any) -> None:
        raise OSError("closed")

    async def ended() -> None:
        ends.append("call")

    with pytest.raises(ClientDisconnect):
        await sse.EventStream(events(), on_end=ended)({"type": "http"}, stays, send)
    assert ends == ["call"]
