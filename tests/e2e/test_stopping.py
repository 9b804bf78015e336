"""A real server that is told to stop, or starts: what those who ask meanwhile are told."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.processes import SERVER, Running, environment, free_port

pytestmark = pytest.mark.slow
BODY = {"prompt": "The king", "prefix_id": "plays", "temperature": 0, "ignore_eos": True}
# Some seconds of work, all of it in one batch
LONG = {**BODY, "max_tokens": 250, "n": 4}
ENDLESS = {**BODY, "max_tokens": 900, "n": 48}
SUPERVISED = ("-c", "from prefix_store.cli import main; main()", "serve")


@pytest.fixture(params=[SERVER, SUPERVISED], ids=["alone", "supervised"])
def command(request: pytest.FixtureRequest) -> tuple[str, ...]:
    found: tuple[str, ...] = request.param
    return found


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[Running]]:
    running: list[Running] = []
    yield running
    for each in running:
        each.close()


def begin(server: Running, body: dict[str, Any], pool: ThreadPoolExecutor) -> tuple[Any, Any]:
    """A plain request and a stream, both of them running when this returns."""
    streaming = threading.Event()

    def stream() -> list[str]:
        with server.client.stream("POST", "/generate", json={**body, "stream": True}) as reply:
            lines = []
            for line in reply.iter_lines():
                lines += [line] if line else []
                streaming.set()
        return lines

    plain = pool.submit(server.client.post, "/generate", json=body)
    streamed = pool.submit(stream)
    assert streaming.wait(60)
    time.sleep(0.3)
    return plain, streamed


def test_what_runs_at_sigterm_is_answered_in_full_and_nothing_new_is_taken(
    tmp_path: Path, started: list[Running], command: tuple[str, ...]
) -> None:
    server = Running.start(tmp_path, *command, DRAIN_SECONDS="60")
    started.append(server)
    with ThreadPoolExecutor(2) as pool:
        plain, streamed = begin(server, LONG, pool)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        ready = server.client.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (503, "stopping")
        refused = server.client.post("/generate", json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert refused.headers["retry-after"] == "1"
        assert not plain.done()
        assert plain.result().json()["usage"]["completion_tokens"] == 1000
        assert streamed.result()[-1] == "data: [DONE]"
        assert server.process.wait(30) == 0, server.log.read_text()


def test_what_takes_longer_than_the_drain_is_told_so(tmp_path: Path, started: list[Running]) -> None:
    server = Running.start(tmp_path, *SUPERVISED, DRAIN_SECONDS="1.5")
    started.append(server)
    with ThreadPoolExecutor(2) as pool:
        plain, streamed = begin(server, ENDLESS, pool)
        status, seconds = server.stop(signal.SIGTERM)
        reply = plain.result()
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "shutting_down")
        *_, last, done = streamed.result()
        assert (json.loads(last.removeprefix("data: "))["error"]["code"], done) == ("shutting_down", "data: [DONE]")
    assert (status, 1.5 <= seconds < 6) == (0, True), server.log.read_text()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(tmp_path: Path, started: list[Running], second: signal.Signals) -> None:
    server = Running.start(tmp_path, *SUPERVISED, DRAIN_SECONDS="60")
    started.append(server)
    with ThreadPoolExecutor(2) as pool:
        plain, _ = begin(server, ENDLESS, pool)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert server.process.poll() is None
        status, seconds = server.stop(second)
        assert plain.result().json()["error"]["code"] == "shutting_down"
    assert (status, seconds < 4) == (0, True), server.log.read_text()


def test_ctrl_c_is_quick(tmp_path: Path, started: list[Running]) -> None:
    server = Running.start(tmp_path, *SUPERVISED, DRAIN_SECONDS="60")
    started.append(server)
    with ThreadPoolExecutor(2) as pool:
        begin(server, ENDLESS, pool)
        status, seconds = server.stop(signal.SIGINT)
    assert (status, seconds < 5) == (0, True), server.log.read_text()


def test_it_says_that_it_loads_until_it_is_ready(tmp_path: Path) -> None:
    port = str(free_port())
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *SERVER], cwd=tmp_path, env=environment(PORT=port), stdout=output, stderr=output
        )
    seen: list[tuple[int, str, int]] = []
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
            deadline = time.monotonic() + 120
            while not seen or seen[-1][0] != 200:
                assert time.monotonic() < deadline, log.read_text()
                assert process.poll() is None, log.read_text()
                try:
                    ready = client.get("/readyz")
                    seen.append((ready.status_code, ready.json()["status"], client.get("/healthz").status_code))
                except httpx.TransportError:
                    assert not seen, "once it answers it goes on answering"
                    time.sleep(0.02)
            assert client.post("/generate", json={**BODY, "max_tokens": 1}).status_code == 200
    finally:
        process.terminate()
        process.wait(30)
    assert seen[-1] == (200, "ready", 200)
    assert set(seen[:-1]) == {(503, "loading", 200)}
