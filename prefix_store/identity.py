"""Which store this is. Its blobs know it too, so that no other store takes them for unneeded."""

from __future__ import annotations

import uuid

from prefix_store import layout
from prefix_store.backends.base import Backend, Transaction


def store_id(backend: Backend) -> str:
    """The store's own name, which it gets when it is first opened. Raises StoreUnavailable."""
    with backend.view() as view:
        found: str | None = view.get(layout.STORE_ID)
    return found or backend.write(_name)


def is_unfinished(backend: Backend) -> bool:
    """Whether a copy into this store has begun and not ended."""
    with backend.view() as view:
        return view.get(layout.UNFINISHED) is not None


def mark_unfinished(backend: Backend, *, unfinished: bool) -> None:
    """Says that a copy into this store begins, or that it has ended."""

    def work(transaction: Transaction) -> None:
        if unfinished:
            transaction.put(layout.UNFINISHED, {})
        else:
            transaction.delete(layout.UNFINISHED)

    backend.write(work)


def _name(transaction: Transaction) -> str:
    found: str = transaction.get(layout.STORE_ID) or uuid.uuid4().hex
    transaction.put(layout.STORE_ID, found)
    return found
