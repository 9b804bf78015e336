"""Work that is done a little at a time, so that others who wait for the same thread never wait for long."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")
# Stops after every slice, and returns what came of them all.
Sliced = Generator[None, None, T]


def done(work: Sliced[T]) -> T:
    """All slices at once."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            found: T = end.value
            return found
