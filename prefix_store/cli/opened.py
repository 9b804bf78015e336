"""The store that ANTEFIX_STORE and ANTEFIX_BLOBS name, for the commands that need no server. One may run meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prefix_store.backends.base import DEFAULT_STORE
from prefix_store.cli.secret import secret
from prefix_store.cli.terminal import fail
from prefix_store.errors import AntefixError

if TYPE_CHECKING:
    from prefix_store.store import Store


@contextmanager
def opened(*, create: bool = False) -> Iterator[Store]:
    """The store; a failure of it is one line, and ends the command."""
    address = secret("ANTEFIX_STORE") or DEFAULT_STORE
    with store_at(address, os.environ.get("ANTEFIX_BLOBS") or None, create=create) as store:
        yield store


@contextmanager
def store_at(address: str, blobs: str | None, *, create: bool, unfinished: bool = False) -> Iterator[Store]:
    """A store at an address. Unless it may be created there must be one: an empty one answers no question."""
    from prefix_store.store import Store  # imports torch, which takes seconds

    try:
        store = Store.open(address, blobs, create=create, unfinished=unfinished)
        try:
            yield store
        finally:
            store.close()
    except AntefixError as error:
        fail(error.message)
