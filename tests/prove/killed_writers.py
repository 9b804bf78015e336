"""Processes that work on a store until they are killed: `python -m … URL`, then a line of JSON a round on stdin.

Two at a time are forked from this one, which has imported torch already, and killed at a moment that the line says.
What each began and what it was told comes out as JSON lines; `"end"` closes a round.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from prefix_store import holds
from prefix_store.backends import redis_blobs
from prefix_store.errors import AntefixError, StoreUnavailable
from prefix_store.prefix import Method, PrefixManifest, PrefixRef
from prefix_store.store import Store
from tests.prefix_store.samples import GEOMETRY

TENANT, NAMES, ALIASES = "acme", ("a", "b", "c"), ("live", "next")
LENGTH, CONTENTS = 1000, 5  # about 100 KB a file; few contents, so that one that is being collected is put again
KV = torch.zeros(2, 2, 2, LENGTH, 3)
MANIFEST = PrefixManifest(Method.PREFIX, GEOMETRY, LENGTH, position_offset=LENGTH)
HOUR = 3600.0
# To the collectors it is two hours later: tombstones have stood long enough, and holds of who lives have not lapsed.
COLLECTING, HOLDING = 2 * HOUR, 3 * HOUR
CHUNK_BYTES = 16 << 10  # several a file
WRITERS = 2
PATIENCE = 20.0


@contextlib.contextmanager
def short_chunks() -> Iterator[None]:
    """Meanwhile a blob in Redis is of several chunks, for whoever writes and whoever reads."""
    usual, redis_blobs.CHUNK_BYTES = redis_blobs.CHUNK_BYTES, CHUNK_BYTES
    try:
        yield
    finally:
        redis_blobs.CHUNK_BYTES = usual


class Writer:
    """Draws one deed after another and tells what becomes of each."""

    def __init__(self, url: str, seed: int, report: int) -> None:
        self._store = Store.open(url)
        self._later = Store.open(url, clock=lambda: time.time() + COLLECTING)
        self._draws = random.Random(seed)
        self._report = report

    def work_for_ever(self) -> None:
        """Until it is killed."""
        deeds = {self.publish: 8, self.set_alias: 3, self.make_current: 2, self.delete: 4, self.collect: 3}
        for number in itertools.count():
            (deed,) = self._draws.choices(list(deeds), list(deeds.values()))
            try:
                deed(number)
            except StoreUnavailable as error:
                self._tell(number, "unavailable", error.message)
                time.sleep(0.02)
            except AntefixError as error:
                self._tell(number, "refused", error.code)

    def publish(self, number: int) -> None:
        """A new version of one of a few contents."""
        KV[0, 0, 0, 0] = self._draws.randrange(CONTENTS)
        name = self._draws.choice(NAMES)
        self._tell(number, "publishing", name)
        version = self._store.prefixes.save(TENANT, name, MANIFEST, {"self.kv": KV})
        self._tell(number, "published", [name, version.version, version.digest])

    def delete(self, number: int) -> None:
        """One version of those that are there, mostly an old one."""
        ref = self._some_version()
        self._tell(number, "deleting", [ref.name, ref.version])
        self._store.prefixes.delete(ref)
        self._tell(number, "deleted", [ref.name, ref.version])

    def set_alias(self, number: int) -> None:
        """To any version."""
        ref, alias = self._some_version(), self._draws.choice(ALIASES)
        self._tell(number, "aliasing", [ref.name, alias, ref.version])
        self._store.prefixes.set_alias(TENANT, ref.name, alias, ref.version or 0)
        self._tell(number, "aliased", [ref.name, alias, ref.version])

    def make_current(self, number: int) -> None:
        """Any version."""
        ref = self._some_version()
        self._tell(number, "switching", [ref.name, ref.version])
        self._store.prefixes.make_current(TENANT, ref.name, ref.version or 0)
        self._tell(number, "switched", [ref.name, ref.version])

    def collect(self, number: int) -> None:
        """All that is free."""
        self._tell(number, "collecting", None)
        self._tell(number, "collected", self._later.collect())

    def _some_version(self) -> PrefixRef:
        name = self._draws.choice(NAMES)
        there = self._store.prefixes.versions(TENANT, name)
        return self._draws.choice(there).ref if there else PrefixRef(TENANT, name, 1)

    def _tell(self, number: int, what: str, told: Any) -> None:
        os.write(self._report, (json.dumps([os.getpid(), number, what, told]) + "\n").encode())


def fork(work: Callable[[int], None]) -> tuple[int, int]:
    """A child that does this with a pipe to write to; its id and the pipe to read from."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            work(writing)
        finally:
            os._exit(1)  # never into the parent's code
    os.close(writing)
    return child, reading


def kill_some(url: str, seed: int, after: int, seconds: float) -> None:
    """Lets two work, and kills both some time after the first has told `after` lines."""
    children = [
        fork(lambda report, index=index: Writer(url, WRITERS * seed + index, report).work_for_ever())
        for index in range(WRITERS)
    ]
    told = _lines(children[0][1], after)
    time.sleep(seconds)
    for child, _ in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    for _, reading in children:
        with os.fdopen(reading, "rb") as report:
            told += report.read()
    sys.stdout.write(told.decode() + '"end"\n')
    sys.stdout.flush()


def _lines(pipe: int, count: int) -> bytes:
    """So many lines, or what comes in time."""
    told, deadline = b"", time.monotonic() + PATIENCE
    while told.count(b"\n") < count and time.monotonic() < deadline:
        if select.select([pipe], [], [], 0.1)[0]:
            piece = os.read(pipe, 1 << 16)
            if not piece:
                break
            told += piece
    return told


def main(url: str) -> None:
    """One round a line, until there are no more."""
    torch.set_num_threads(1)  # a pool of threads does not live through a fork
    holds.HOLD_SECONDS = HOLDING
    with short_chunks():
        print('"ready"', flush=True)
        for line in sys.stdin:
            kill_some(url, **json.loads(line))


if __name__ == "__main__":
    main(*sys.argv[1:])
