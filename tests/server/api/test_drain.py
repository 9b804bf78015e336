import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from starlette.testclient import TestClient

from server.api.drain import Drain
from tests.server.conftest import Serve
from tests.server.fakes import FakeLoop


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_it_is_over_when_nothing_runs_or_the_time_is_up() -> None:
    clock = Clock()
    drain = Drain(5.0, clock)
    drain.running = 1
    assert (drain.has_begun, drain.is_over, drain.is_late) == (False, False, False)
    drain.begin()
    assert (drain.has_begun, drain.is_over) == (True, False)
    clock.now += 4.0
    drain.begin()  # again, and it ends no later
    clock.now += 0.9
    assert not drain.is_over
    drain.running = 0
    assert (drain.is_over, drain.is_late) == (True, False)
    drain.running = 1
    clock.now += 0.2
    assert (drain.is_over, drain.is_late) == (True, True)


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/generate"), ("GET", "/v1/models"), ("POST", "/v1/prefixes"), ("GET", "/nowhere")]
)
def test_nothing_new_is_taken(serve: Serve, loop: FakeLoop, method: str, path: str) -> None:
    drain = Drain(60.0)
    client = serve(drain=drain)
    drain.begin()
    reply = client.request(method, path, json={"prompt": "x"} if method == "POST" else None)
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "shutting_down")
    assert (reply.headers["retry-after"], reply.headers["connection"]) == ("1", "close")
    assert reply.headers["x-request-id"]
    assert loop.requests == []
    assert 'code="shutting_down"} 1.0' in client.get("/metrics").text


def test_watchers_are_answered_to_the_end(serve: Serve) -> None:
    drain = Drain(60.0)
    client = serve(drain=drain)
    drain.begin()
    assert client.get("/healthz").status_code == client.get("/metrics").status_code == 200
    reply = client.get("/readyz")
    assert (reply.status_code, reply.json()) == (503, {"status": "stopping", "model": True, "store": True})


@pytest.mark.parametrize("stream", [False, True])
def test_what_runs_is_answered_in_full(serve: Serve, loop: FakeLoop, stream: bool) -> None:
    drain = Drain(60.0)
    client: TestClient = serve(drain=drain)
    whole = client.post("/generate", json={"prompt": "x"}).json()["text"]
    assert drain.running == 0
    loop.hold.clear()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.post, "/generate", json={"prompt": "x", "stream": stream})
        deadline = time.monotonic() + 10
        while len(loop.requests) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        drain.begin()
        assert (drain.running, drain.is_over) == (1, False)
        threading.Timer(0.1, loop.hold.set).start()
        reply = asked.result(30)
    assert reply.status_code == 200
    if not stream:
        assert reply.json()["text"] == whole
    assert "shutting_down" not in reply.text
    assert drain.is_over


def test_a_request_that_fails_is_no_longer_running(serve: Serve, loop: FakeLoop) -> None:
    drain = Drain()
    client = serve(drain=drain)
    loop.refusal = RuntimeError("nobody foresaw this")
    assert client.post("/generate", json={"prompt": "x"}).status_code == 500
    assert client.post("/generate", content=b"{").status_code == 400
    assert drain.running == 0
