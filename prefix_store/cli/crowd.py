"""Many requests to a server, some at a time: asked again while it is full, with a bar where there is a terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import Queue
from typing import TypeVar

from prefix_store.cli.client import Busy
from prefix_store.cli.terminal import is_live

PATIENCE_SECONDS = 600.0  # with one request, of a server that says again and again that it is full
Work = TypeVar("Work")
Done = TypeVar("Done")


def ask_all(work: Sequence[Work], ask: Callable[[Work], Done], at_a_time: int, doing: str) -> list[Done]:
    """What `ask` makes of each, in order, with at most `at_a_time` asked at once.

    The first failure ends it: nothing new is asked, and it is raised as it came.
    """
    todo, ended = deque(enumerate(work)), Queue[tuple[int, Done | BaseException]]()

    def run() -> None:
        while True:
            try:
                place, one = todo.popleft()
            except IndexError:
                return
            try:
                ended.put((place, patiently(ask, one)))
            except BaseException as error:  # for the one who waits
                ended.put((place, error))

    # daemons: on Ctrl-C nobody waits for what is still on its way
    for _ in range(min(at_a_time, len(work))):
        threading.Thread(target=run, daemon=True).start()
    done: dict[int, Done] = {}
    try:
        with _bar(doing, len(work)) as tell:
            while len(done) < len(work):
                place, outcome = ended.get()
                if isinstance(outcome, BaseException):
                    raise outcome
                done[place] = outcome
                tell()
    finally:
        todo.clear()
    return [done[place] for place in range(len(work))]


def patiently(ask: Callable[[Work], Done], one: Work) -> Done:
    """Asks until the server has room, as late as it says. Raises Busy once that has taken too long."""
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return ask(one)
        except Busy as busy:
            if time.monotonic() + busy.seconds > until:
                raise
            time.sleep(busy.seconds)


@contextmanager
def _bar(doing: str, total: int) -> Iterator[Callable[[], None]]:
    if not is_live(sys.stderr):
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(doing, total=total)
        yield lambda: bar.advance(task)
