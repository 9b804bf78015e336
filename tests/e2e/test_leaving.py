"""Clients that leave, at any point and on each route that generates, and clients that read slowly."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.e2e.processes import SERVER, Running
from tests.e2e.wire import connected, posting, reset, send

pytestmark = pytest.mark.slow
ROUTES = {
    "/generate": {"prompt": "x", "prefix_id": "plays"},
    "/v1/completions": {"prompt": ["x", "y"], "model": "plays"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "model": "plays"},
}
# Twelve choices of 900 tokens take many seconds, so that whoever is gone has left, not ended.
LONG = {"max_tokens": 900, "n": 12, "ignore_eos": True}
FREE_SECONDS, START_SECONDS = 1.0, 10.0
READERS = 4


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running.start(tmp_path_factory.mktemp("leaving"), *SERVER)
    try:
        send(running, body("/generate", stream=False, max_tokens=1))  # its prefix stays on the device from now on
        yield running
        assert '"unhandled"' not in running.log.read_text()
    finally:
        running.close()


def body(path: str, *, stream: bool, **changes: object) -> bytes:
    return posting(path, json.dumps({**ROUTES[path], **LONG, "stream": stream, **changes}).encode())


def gauges(server: Running) -> dict[str, float]:
    lines = [line.split() for line in server.client.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name.removeprefix("antefix_"): float(value) for name, value in lines if "{" not in name}


def wait_until(server: Running, holds: Callable[[dict[str, float]], bool], seconds: float) -> float:
    """How long it took."""
    begun = time.monotonic()
    while not holds(found := gauges(server)):
        assert time.monotonic() - begun < seconds, found
        time.sleep(0.01)
    return time.monotonic() - begun


def is_idle(found: dict[str, float]) -> bool:
    return found["num_requests_running"] == found["num_requests_waiting"] == 0


def before_the_body_ends(server: Running, connection: socket.socket, sent: bytes) -> None:
    connection.sendall(sent[:-10])
    time.sleep(0.05)


def as_soon_as_it_is_sent(server: Running, connection: socket.socket, sent: bytes) -> None:
    connection.sendall(sent)


def while_it_runs(server: Running, connection: socket.socket, sent: bytes) -> None:
    connection.sendall(sent)
    wait_until(server, lambda found: found["num_requests_running"] >= LONG["n"], START_SECONDS)


def in_mid_stream(server: Running, connection: socket.socket, sent: bytes) -> None:
    connection.sendall(sent)
    received = b""
    while received.count(b"data: ") < 20:
        received += connection.recv(1000)


@pytest.mark.parametrize("how", [reset, socket.socket.close], ids=["reset", "close"])
@pytest.mark.parametrize(
    ("when", "stream"),
    [
        (before_the_body_ends, False),
        (as_soon_as_it_is_sent, False),
        (as_soon_as_it_is_sent, True),
        (while_it_runs, False),
        (while_it_runs, True),
        (in_mid_stream, True),
    ],
)
@pytest.mark.parametrize("path", ROUTES)
def test_a_client_that_leaves_gives_its_slots_back(
    server: Running,
    path: str,
    when: Callable[[Running, socket.socket, bytes], None],
    stream: bool,
    how: Callable[[socket.socket], None],
) -> None:
    before = gauges(server)
    assert is_idle(before)
    with connected(server) as connection:
        when(server, connection, body(path, stream=stream))
        how(connection)
    if when is as_soon_as_it_is_sent:
        time.sleep(0.1)  # it may not even have begun
    wait_until(server, is_idle, FREE_SECONDS)
    after = gauges(server)
    assert after["kv_slots_used"] == before["kv_slots_used"]
    assert after["generation_tokens_total"] - before["generation_tokens_total"] < LONG["n"] * LONG["max_tokens"]


def test_many_that_leave_at_once(server: Running) -> None:
    before = gauges(server)
    with ExitStack() as stack:
        connections = [stack.enter_context(connected(server)) for _ in range(30)]
        for number, connection in enumerate(connections):
            connection.sendall(body(list(ROUTES)[number % 3], stream=bool(number % 2)))
        wait_until(server, lambda found: found["num_requests_waiting"] > 100, START_SECONDS)
        for number, connection in enumerate(connections):
            (reset if number % 2 else socket.socket.close)(connection)
    wait_until(server, is_idle, FREE_SECONDS)
    assert gauges(server)["kv_slots_used"] == before["kv_slots_used"]


def test_slow_readers_hold_up_nobody(server: Running) -> None:
    """Streams that nobody reads fill what the kernel holds, and then wait; what others ask for does not."""

    def seconds() -> float:
        begun = time.monotonic()
        assert send(server, body("/generate", stream=False, n=1, max_tokens=30)).status == 200
        return time.monotonic() - begun

    alone = min(seconds() for _ in range(3))
    with ExitStack() as stack:
        for _ in range(READERS):
            connection = stack.enter_context(connected(server, buffer=4096))
            connection.sendall(body("/v1/completions", stream=True, prompt="x", n=2, max_tokens=600, logprobs=20))
        beside = seconds()
        wait_until(server, is_idle, 60)  # they are computed to their end, though nobody reads
        after = min(seconds() for _ in range(3))
        assert after < 2 * alone + 0.2
    assert beside < 30 * alone + 2
    wait_until(server, is_idle, FREE_SECONDS)
