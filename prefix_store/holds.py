"""Blobs that are written before the record that names them: a hold keeps them from being collected in between."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from prefix_store import layout
from prefix_store.backends.base import Backend, Transaction
from prefix_store.errors import StoreUnavailable

# After this the collector may forget a hold: its writer was killed.
HOLD_SECONDS = 3600.0


@contextmanager
def held(backend: Backend, tenant: str, digest: str) -> Iterator[str]:
    """Holds a blob, present or not, for whom it is written. The key that it gives goes to `release`."""
    key = layout.hold(digest, uuid.uuid4().hex)
    backend.write(lambda transaction: transaction.put(key, {"until": transaction.now + HOLD_SECONDS, "tenant": tenant}))
    try:
        yield key
    except BaseException:
        with suppress(StoreUnavailable):
            backend.write(lambda transaction: transaction.delete(key))
        raise


def is_needed(backend: Backend, digest: str) -> bool:
    """Whether a record names the blob, or a hold keeps it."""
    with backend.view() as view:
        return bool(view.scan(layout.blob(digest), limit=1))


def release(transaction: Transaction, key: str) -> None:
    """Ends a hold in the transaction that names the blob. Raises StoreUnavailable if it is gone: the blob may be, too.

    It is gone when the writer took longer than `HOLD_SECONDS`, or when its tenant was erased meanwhile.
    """
    if transaction.get(key) is None:
        raise StoreUnavailable("storing this took too long, so it was given up; try again")
    transaction.delete(key)
