"""Workers that train until they are killed, frozen, or done: `python -m … URL`, then a line of JSON a round on stdin.

Each is forked from this process, which has imported torch but run nothing of it: autograd does not live through a fork.
A line says whether jobs may share steps and after how many steps the worker is struck, if at all; one comes back with
how its jobs ended for it.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from prefix_store.store import Store
from tests.models import tiny_frozen
from tests.prove.killed_writers import fork
from trainer import room, samples
from trainer.worker import Worker

FAMILY = "llama"
LEASE, BEAT, CHECKPOINT = 2.0, 0.2, 0.02  # seconds; short, as the kills follow one another within a second or two
PATIENCE = 120.0
STEP = "step"


def work(url: str, name: str, packed: bool, report: int) -> None:
    """Trains what it can get until every job has ended, and tells of every step and every end."""

    def tell(what: str) -> None:
        os.write(report, f"{what}\n".encode())

    # of this process alone, which is a fork
    samples.TOKENS = 4  # else most of the kills would strike while it writes these
    if not packed:
        room.MOST = 1
    store, model = Store.open(url), tiny_frozen(FAMILY)
    while any(count for status, count in store.jobs.job_counts().items() if not status.is_final):
        worker = Worker(
            store,
            model,
            name,
            lease_seconds=LEASE,
            heartbeat_seconds=BEAT,
            checkpoint_seconds=CHECKPOINT,
            say=lambda line: None,
            on_step=lambda: tell(STEP),
            on_end=tell,
        )
        if worker.run_until_empty() == 0:
            time.sleep(0.05)
    os._exit(0)


class Child:
    """A worker in a process of its own."""

    def __init__(self, url: str, name: str, packed: bool) -> None:
        self._process, reading = fork(lambda report: work(url, name, packed, report))
        self._lines = os.fdopen(reading, "r")
        self.steps, self.ends = 0, []

    def steps_to(self, count: int) -> bool:
        """Waits until it has taken so many; False if it ended before."""
        return any(self.steps >= count for _ in self._hear())

    def signal(self, number: signal.Signals) -> None:
        os.kill(self._process, number)

    def wait(self) -> bool:
        """Until it has ended, by itself or not; whether it ended well."""
        for _ in self._hear():
            pass
        _, status = os.waitpid(self._process, 0)
        return status == 0

    def _hear(self) -> Iterator[None]:
        for line in self._lines:
            if line.strip() == STEP:
                self.steps += 1
            else:
                self.ends.append(line.strip())
            yield


def strike(url: str, name: str, packed: bool, after: int | None, seconds: float) -> dict[str, Any]:
    """A worker that is killed so long after so many steps, or never."""
    child = Child(url, name, packed)
    killed = after is not None and child.steps_to(after)
    if killed:
        time.sleep(seconds)
        child.signal(signal.SIGKILL)
    return {"well": child.wait(), "killed": killed, "steps": child.steps, "ends": child.ends}


def freeze(url: str, after: int) -> dict[str, Any]:
    """One worker is stopped past its lease, a second does its jobs, the first goes on."""
    first = Child(url, "first", True)
    first.steps_to(after)
    first.signal(signal.SIGSTOP)
    while _is_locked(url):  # a frozen writer keeps everyone from an SQLite file, and this is not about that
        first.signal(signal.SIGCONT)
        time.sleep(0.01)
        first.signal(signal.SIGSTOP)
    time.sleep(2 * LEASE)
    second = Child(url, "second", True)
    well = second.wait()
    first.signal(signal.SIGCONT)
    return {"well": well and first.wait(), "first": first.ends, "second": second.ends, "steps": first.steps}


def _is_locked(url: str) -> bool:
    """Whether somebody is in the middle of a write to an SQLite store or its blobs."""
    if not url.startswith("sqlite:///"):
        return False
    path = Path(url.removeprefix("sqlite:///"))
    try:
        with closing(sqlite3.connect(path, timeout=0.1, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            db.execute("ROLLBACK")
        with (path.parent / "blobs" / "lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (sqlite3.OperationalError, BlockingIOError):
        return True
    return False


def main(url: str) -> None:
    """One round a line, until there are no more."""
    torch.set_num_threads(1)  # a pool of threads does not live through a fork
    print('"ready"', flush=True)
    for line in sys.stdin:
        round_ = json.loads(line)
        print(json.dumps(freeze(url, **round_) if set(round_) == {"after"} else strike(url, **round_)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
