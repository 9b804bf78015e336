"""From one store into another, empty one: every record and every blob, verified."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

from prefix_store import identity
from prefix_store.backends.base import Transaction, to_json, walk
from prefix_store.errors import Conflict, StoreCorrupt
from prefix_store.store import Store

# the first part of every key that is copied
FOLDERS = (
    "version", "name", "retired", "expiry", "shared", "tombstone", "blob", "file", "job", "jobs", "queued", "running",
    "turn", "event", "tenant", "usage", "key", "once", "audit",
)  # fmt: skip
BATCH = 200


def migrate(source: Store, target: Store, say: Callable[[str], None]) -> int:
    """Copies blobs, then records, and compares both; returns how many records.

    Nothing may write to either meanwhile. Interrupted, it is done again from the start, into the same target, which
    nobody can open until it is whole. Raises Conflict if the target is the source or has records that the source has
    not, StoreCorrupt for a blob that is damaged or records that differ in the end.
    """
    _check_target(source, target)
    identity.mark_unfinished(target.backend, unfinished=True)
    digests = sorted(_referenced(source))
    for number, digest in enumerate(digests, start=1):
        target.blobs.put(source.blobs.read(digest))
        if number % BATCH == 0 or number == len(digests):
            say(f"blobs: {number} of {len(digests)}")
    copied = 0
    for folder in FOLDERS:
        copied += _copy(source, target, folder)
    say(f"records: {copied}")
    for digest in digests:
        target.blobs.read(digest)
    if fingerprint(source) != fingerprint(target):
        raise StoreCorrupt("the copy differs from its source; did something write to either meanwhile?")
    identity.mark_unfinished(target.backend, unfinished=False)
    return copied


def fingerprint(store: Store) -> str:
    """sha256 over every record, in order."""
    digest = hashlib.sha256()
    for folder in FOLDERS:
        for key, value in walk(store.backend, f"{folder}/"):
            digest.update(f"{folder}/{key}\0{to_json(value)}\0".encode())
    return digest.hexdigest()


def _check_target(source: Store, target: Store) -> None:
    if identity.store_id(source.backend) == identity.store_id(target.backend):
        raise Conflict("both addresses are of one store")
    for folder in FOLDERS:
        after = ""
        while page := _page(target, folder, after):
            keys = [f"{folder}/{key}" for key, _ in page]
            with source.backend.view() as view:
                foreign = [key for key, value in zip(keys, view.get_many(keys), strict=True) if value is None]
            if foreign:
                raise Conflict(f"the target store is not empty: it has {foreign[0]!r}")
            after = page[-1][0]


def _referenced(store: Store) -> set[str]:
    return {key.partition("/")[0] for key, entry in walk(store.backend, "blob/") if "until" not in entry}


def _copy(source: Store, target: Store, folder: str) -> int:
    after, count = "", 0
    while page := _page(source, folder, after):
        target.backend.write(partial(_put, folder, page))
        count += len(page)
        after = page[-1][0]
    return count


def _put(folder: str, page: list[tuple[str, Any]], transaction: Transaction) -> None:
    for key, value in page:
        transaction.put(f"{folder}/{key}", value)


def _page(store: Store, folder: str, after: str) -> list[tuple[str, Any]]:
    with store.backend.view() as view:
        return view.scan(f"{folder}/", after=after, limit=BATCH)
