"""Stores of every kind for the proofs about them: embedded, and in real servers that the proof starts."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.redis_server import PROGRAMS, RedisServer, program, running

KINDS = ("sqlite", *PROGRAMS)


@dataclass(frozen=True)
class Place:
    """Where a new store may be opened; `server` is the one that it will be in, if any."""

    kind: str
    url: str
    folder: Path
    server: RedisServer | None = None


@contextmanager
def place(kind: str) -> Iterator[Place]:
    """A place for a store of this kind, gone afterwards."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="antefix-")))
        if kind == "sqlite":
            yield Place(kind, f"sqlite:///{folder}/store.db", folder)
            return
        server = stack.enter_context(running(kind, folder))
        yield Place(kind, server.url, folder, server)


def at_hand() -> list[str]:
    """The kinds that can be had on this machine."""
    return [kind for kind in KINDS if kind == "sqlite" or program(kind) is not None]
