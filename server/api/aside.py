"""Long computations beside the engine, which give way to it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

from anyio import to_thread

from server.api.services import Services

# as `nice` counts: beside a busy engine a tenth of its share, and all that is left beside an idle one
LOW_PRIORITY = 10
T = TypeVar("T")


async def run(services: Services, work: Callable[[], T]) -> T:
    """The result of `work`, one at a time; a caller that leaves lets it end."""
    return await to_thread.run_sync(_in_a_thread_of_its_own, work, limiter=services.inspecting)


def _in_a_thread_of_its_own(work: Callable[[], T]) -> T:
    """A thread cannot take back its priority, so none is lowered that others will use."""
    future: Future[T] = Future()
    threading.Thread(target=_fill, args=(future, work), name="aside", daemon=True).start()
    return future.result()


def _fill(future: Future[T], work: Callable[[], T]) -> None:
    # only Linux knows a priority for each thread; the threads that its products run in inherit it
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOW_PRIORITY)
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)
