import threading
import time
from collections.abc import Callable

import structlog
from starlette.testclient import TestClient

from prefix_store.errors import StoreUnavailable
from prefix_store.store import Store
from server.collector import Collector
from tests.server.conftest import Serve


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Collected:
    """A store that counts how often it is asked."""

    def __init__(self, *failures: Exception) -> None:
        self.calls = 0
        self._failures = list(failures)

    def collect(self) -> int:
        self.calls += 1
        if self._failures:
            raise self._failures.pop()
        return 1


def test_it_collects_now_and_then_whatever_goes_wrong() -> None:
    store = Collected(StoreUnavailable("away"), RuntimeError("a bug"))
    collector = Collector(store, 0.005)
    with structlog.testing.capture_logs() as lines:
        collector.start()
        until(lambda: store.calls >= 4)
        collector.stop()
        collector.join(5)
    assert not collector.is_alive()
    assert {line["event"] for line in lines} == {"collection failed", "unhandled", "collected"}


def test_a_server_collects_while_it_runs_and_ends_at_once(serve: Serve, store: Store) -> None:
    store.backend.write(lambda transaction: transaction.put("once/acme/old", {"until": 0.0}))
    with serve(collect_seconds=0.01), store.backend.view() as view:
        until(lambda: view.get("once/acme/old") is None)
    assert not any(thread.name == "collector" for thread in threading.enumerate())


def test_one_that_is_far_off_does_not_hold_up_the_end(serve: Serve) -> None:
    client: TestClient = serve()
    with client:
        begun = time.monotonic()
    assert time.monotonic() - begun < 1
    assert not any(thread.name == "collector" for thread in threading.enumerate())
