import errno
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from prefix_store.model.frozen import FrozenModel
from prefix_store.store import Store
from server.api import reach
from server.api.drain import Drain
from tests.server import artefacts
from tests.server.conftest import Serve
from tests.server.fakes import FakeLoop


@pytest.mark.parametrize("path", ["/healthz", "/health"])
def test_the_process_is_up(client: TestClient, path: str) -> None:
    assert client.get(path).json() == {"status": "ok"}


def ready(client: TestClient, **params: str) -> tuple[int, str, bool, bool]:
    reply = client.get("/readyz", params=params)
    found = reply.json()
    return reply.status_code, found["status"], found["model"], found["store"]


def test_without_its_store_a_server_stays_ready_and_says_so(serve: Serve, store: Store) -> None:
    client = serve()
    assert ready(client) == ready(client, store="1") == (200, "ready", True, True)
    store.close()
    assert ready(client) == (200, "degraded", True, False)
    assert ready(client, store="1") == (503, "degraded", True, False)


def test_a_store_that_hangs_holds_up_no_probe_and_is_asked_once_at_a_time(
    serve: Serve, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    goes_on = threading.Event()

    def hangs() -> None:
        asked.append(1)
        goes_on.wait(30)

    monkeypatch.setattr(reach, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(store, "ping", hangs)
    client = serve()
    begun = time.monotonic()
    assert ready(client) == ready(client) == (200, "degraded", True, False)
    assert (time.monotonic() - begun < 5, len(asked)) == (True, 1)
    goes_on.set()
    deadline = time.monotonic() + 10
    while ready(client)[1] != "ready":
        assert time.monotonic() < deadline


def test_a_failed_engine_is_not_ready(client: TestClient, loop: FakeLoop) -> None:
    loop.has_failed = True
    loop.stop()
    assert ready(client) == (503, "failed", False, True)


def test_an_engine_that_has_failed_says_so_also_while_what_runs_is_answered(serve: Serve, loop: FakeLoop) -> None:
    drain = Drain(30)
    client = serve(drain=drain)
    loop.has_failed = True
    drain.begin()
    assert ready(client)[:2] == (503, "failed")
    loop.has_failed = False
    assert ready(client)[:2] == (503, "stopping")


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EIO], ids=errno.errorcode.get)
def test_a_blob_folder_that_cannot_be_entered_is_a_store_that_is_away(
    client: TestClient, frozen: FrozenModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int
) -> None:
    def refusing(of: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *more: Any, **named: Any) -> Any:
            if str(path).startswith(str(tmp_path / "blobs")):
                raise OSError(number, os.strerror(number), str(path))
            return of(path, *more, **named)

        return call

    file = {"file": ("f", artefacts.native(frozen))}
    assert ready(client) == (200, "ready", True, True)
    for name in ("stat", "scandir", "listdir", "mkdir", "open", "statvfs"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    assert ready(client) == (200, "degraded", True, False)
    refused = client.post("/v1/prefixes", data={"id": "a"}, files=file)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
    assert os.strerror(number) in refused.json()["error"]["message"]
    assert "\nantefix_store_up 0.0\n" in client.get("/metrics").text


def test_a_blob_folder_that_is_gone_is_no_store(client: TestClient, tmp_path: Path) -> None:
    free = re.search(r"^antefix_blobs_free_bytes (\S+)$", client.get("/metrics").text, re.MULTILINE)
    assert free is not None
    assert float(free[1]) > 0
    (tmp_path / "blobs").rename(tmp_path / "elsewhere")
    assert ready(client) == (200, "degraded", True, False)
    shown = client.get("/metrics").text
    assert "\nantefix_store_up 0.0\n" in shown
    assert "\nantefix_blobs_free_bytes" not in shown


def test_a_scrape_does_not_wait_for_a_store_that_hangs(
    serve: Serve, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()
    monkeypatch.setattr(reach, "SCRAPE_SECONDS", 0.2)
    monkeypatch.setattr(store.jobs, "job_counts", lambda: goes_on.wait(30))
    client = serve()
    begun = time.monotonic()
    shown = client.get("/metrics").text
    assert time.monotonic() - begun < 5
    goes_on.set()
    assert "\nantefix_store_up 0.0\n" in shown
    assert "\nantefix_num_requests_running 0.0\n" in shown


def test_metrics_are_in_prometheus_s_text_format(client: TestClient) -> None:
    reply = client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    for name in ("antefix_num_requests_running", "antefix_num_requests_waiting", "antefix_store_up"):
        assert f"\n{name} " in reply.text


def test_shutting_down_stops_the_engine_and_closes_the_store(serve: Serve, loop: FakeLoop) -> None:
    with serve() as client:
        assert client.get("/healthz").status_code == 200
        assert not loop.stopped
    assert loop.stopped
