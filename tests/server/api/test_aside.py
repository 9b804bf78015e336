"""What runs aside gives way to everything else, one at a time."""

from __future__ import annotations

import os
import sys
import threading

import anyio
import pytest
from starlette.testclient import TestClient

from server.api import aside
from server.api.services import Services

pytestmark = pytest.mark.anyio


@pytest.fixture
def services(client: TestClient) -> Services:
    found: Services = client.app.state.services  # type: ignore[attr-defined]
    return found


async def test_one_at_a_time(services):
    running, most = 0, 0

    def work() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        threading.Event().wait(0.02)
        running -= 1

    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(aside.run, services, work)
    assert (running, most) == (0, 1)


async def test_what_fails_fails_for_its_caller_alone(services):
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await aside.run(services, fail)
    assert await aside.run(services, lambda: 3) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
async def test_it_gives_way_and_leaves_other_threads_as_they_were(services):
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    assert await aside.run(services, priority) == aside.LOW_PRIORITY
    assert await anyio.to_thread.run_sync(priority) < aside.LOW_PRIORITY
