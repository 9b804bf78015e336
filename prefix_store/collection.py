"""What is no longer wanted leaves the store: expired versions, tombstones, and blobs that no record names."""

from __future__ import annotations

from functools import partial
from itertools import takewhile

from prefix_store import audit, holds, layout
from prefix_store.backends.base import PAGE, Backend, Blobs, Transaction, walk
from prefix_store.name_records import highest_besides, read_name, read_version, remove_versions

# A deleted version's file stays as long, for whoever found the version just before.
TOMBSTONE_SECONDS = 3600.0


def collect(backend: Backend, blobs: Blobs) -> int:
    """Returns how many blobs were removed. Safe while others read and write, and to be killed at any moment."""
    expire(backend)
    with backend.view() as view:
        now = view.now
    _bury(backend, now)
    _forget_answers(backend, now)
    needed = _needed(backend, now)
    blobs.tidy()
    # asked again for each, for it may have been named since
    return sum(
        blobs.remove_unless(digest, partial(holds.is_needed, backend, digest))
        for digest in blobs.digests()
        if digest not in needed
    )


def expire(backend: Backend) -> None:
    """Removes the versions that have expired; until then they count against quotas."""
    with backend.view() as view:
        now = view.now
    due = takewhile(lambda record: record[0].partition("/")[0] <= layout.milliseconds(now), walk(backend, "expiry/"))
    for key, _ in due:
        _, tenant, name, number = key.split("/")
        backend.write(partial(_expire_one, tenant, name, int(number)))


def _expire_one(tenant: str, name: str, number: int, transaction: Transaction) -> None:
    record = read_name(transaction, tenant, name)
    version = read_version(transaction, tenant, name, number)
    if record is not None and version is not None and version.has_expired(transaction.now):
        left = highest_besides(transaction, version)
        remove_versions(transaction, record, [version], left, audit.LOCAL, "prefix.expire")


def _bury(backend: Backend, now: float) -> None:
    """Forgets the tombstones that have stood long enough."""
    old: list[str] = []
    for path, entry in walk(backend, "tombstone/"):
        if entry["at"] + TOMBSTONE_SECONDS <= now:
            old += [f"{layout.blob(entry['digest'])}version/{path}", f"tombstone/{path}"]
    _forget(backend, old)


def _forget_answers(backend: Backend, now: float) -> None:
    """To requests that nobody repeats any more."""
    old = [key for key, entry in walk(backend, "once/") if entry["until"] <= now]
    for start in range(0, len(old), PAGE):
        backend.write(partial(_forget_if_old, old[start : start + PAGE]))


def _forget_if_old(keys: list[str], transaction: Transaction) -> None:
    for key in keys:
        entry = transaction.get(f"once/{key}")
        if entry is not None and entry["until"] <= transaction.now:  # it may have been made anew since
            transaction.delete(f"once/{key}")


def _needed(backend: Backend, now: float) -> set[str]:
    """The digests that records name. Holds that have lapsed are forgotten, which ends their writers' hopes."""
    found: set[str] = set()
    lapsed: list[str] = []
    for key, entry in walk(backend, "blob/"):
        if entry.get("until", now) < now:
            lapsed.append(f"blob/{key}")
        else:
            found.add(key.partition("/")[0])
    _forget(backend, lapsed)
    return found


def _forget(backend: Backend, keys: list[str]) -> None:
    for start in range(0, len(keys), PAGE):
        backend.write(partial(_delete, keys[start : start + PAGE]))


def _delete(keys: list[str], transaction: Transaction) -> None:
    for key in keys:
        transaction.delete(key)
