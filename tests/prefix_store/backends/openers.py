"""How to open each backend in a folder. A new backend adds a line, and the whole contract suite runs against it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from prefix_store.backends.base import Backend
from prefix_store.backends.sqlite import SqliteBackend

OPENERS: dict[str, Callable[[Path, Callable[[], float]], Backend]] = {
    "sqlite": lambda folder, clock: SqliteBackend(folder / "store.db", clock),
}
