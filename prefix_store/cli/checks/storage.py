"""The store: reached, writable, nobody else's to read, whole, with a right clock; and who may use it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from prefix_store.backends.blobs import FolderBlobs
from prefix_store.cli.amounts import counted
from prefix_store.cli.checks.finding import Finding, ok, problem, warning
from prefix_store.errors import AntefixError, StoreUnavailable

if TYPE_CHECKING:
    from prefix_store.store import Store

SQLITE = "sqlite:///"
# A record that is never there; removing it is a write all the same.
PROBE = "doctor/probe"
PROBE_BYTES = bytes(1 << 16)
# Leases and keys go by the store's clock, answers from memory by this machine's.
CLOCK_SECONDS = 5.0
OTHERS = 0o077


def is_absent(address: str) -> bool:
    """Whether it is an embedded store that nobody has made yet."""
    return address.startswith(SQLITE) and not Path(address.removeprefix(SQLITE)).is_file()


def to_be_made(address: str) -> Finding:
    """Whether `antefix serve` can make an embedded store that is absent."""
    folder = Path(address.removeprefix(SQLITE)).absolute().parent
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return problem("store", f"there is none at {address}, and none can be made in {there}: {_hand_over(there)}")
    return warning("store", f"there is none at {address}; ANTEFIX_STORE says where, and antefix serve makes it")


def closed(error: AntefixError) -> Finding:
    """A store that cannot be opened."""
    cause = error.__cause__
    if isinstance(cause, PermissionError) and cause.filename is not None:
        return problem("store", f"{error.message}: {_hand_over(Path(cause.filename))}")
    return problem("store", f"{error.message}: ANTEFIX_STORE and ANTEFIX_BLOBS say where it is")


def _hand_over(path: Path) -> str:
    return f"run antefix as the user that owns it, or give it to user {os.geteuid()} (chown -R, chmod u+rwX {path})"


def look(store: Store, address: str, host: str, say: Callable[[int, int], None]) -> Iterator[Finding]:
    """Everything about a store that could be opened. Changes nothing that lasts."""
    yield _writable(store)
    yield from _permissions(store, address)
    yield from _clock(store)
    yield _access(store, host)
    yield from _contents(store, say)


def folders(store: Store | None, address: str) -> list[Path]:
    """Where an embedded store and its blobs are, or will be."""
    found = []
    if address.startswith(SQLITE):
        found.append(Path(address.removeprefix(SQLITE)).absolute().parent)
    if store is not None and isinstance(store.blobs, FolderBlobs):
        found.append(store.blobs.root)
    return found


def _writable(store: Store) -> Finding:
    try:
        store.backend.write(lambda transaction: transaction.delete(PROBE))
        with store.blobs.spool() as path, path.open("wb") as file:
            file.write(PROBE_BYTES)
            file.flush()
            os.fsync(file.fileno())
    except (AntefixError, OSError) as error:
        said = error.message if isinstance(error, AntefixError) else str(error)
        return problem("store", f"it cannot be written: {said}; everything but generating with what is known fails")
    return ok("store", "reached, and writable")


def _permissions(store: Store, address: str) -> Iterator[Finding]:
    paths = [store.blobs.root] if isinstance(store.blobs, FolderBlobs) else []
    if address.startswith(SQLITE):
        path = Path(address.removeprefix(SQLITE)).absolute()
        paths += [path, *(path.with_name(path.name + end) for end in ("-wal", "-shm"))]
    found = [finding for path in paths if path.exists() for finding in _permission(path)]
    yield from found
    if paths and not found:
        yield ok("permissions", "nobody else on this machine can read the store")


def _permission(path: Path) -> Iterator[Finding]:
    there = path.stat()
    if not os.access(path, os.R_OK | os.W_OK):
        yield problem("permissions", f"{path} cannot be read and written by user {os.geteuid()}: chown it to that user")
    elif there.st_uid != os.geteuid():
        yield warning(
            "permissions",
            f"{path} is user {there.st_uid}'s, and this is user {os.geteuid()}: run all antefix commands as one user",
        )
    if there.st_mode & OTHERS:
        yield warning("permissions", f"others on this machine may open {path}: chmod -R go-rwx {path}")


def _clock(store: Store) -> Iterator[Finding]:
    begun = time.time()
    with store.backend.view() as view:
        theirs = view.now
    ours = (begun + time.time()) / 2
    if abs(theirs - ours) > CLOCK_SECONDS:
        yield warning(
            "clock",
            f"the store's differs from this machine's by {theirs - ours:+.0f} s, so that keys end too early or too "
            "late: synchronise both (NTP)",
        )
    else:
        yield ok("clock", "the store's and this machine's agree")


def _access(store: Store, host: str) -> Finding:
    keys = store.keys.all()
    if not keys and not _is_loopback(host):
        return problem(
            "access",
            f"the server refuses to listen on {host} without a key: antefix key new --tenant default --scope admin",
        )
    if not keys:
        return ok("access", "open mode: no key, one tenant, and only this machine gets in")
    if all(key.has_expired(time.time()) for key in keys):
        return warning("access", "every key has expired, so nobody gets in: antefix key new --tenant … --scope …")
    return ok("access", f"{counted(len(keys), 'key')}; without one nobody gets in")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _contents(store: Store, say: Callable[[int, int], None]) -> Iterator[Finding]:
    from prefix_store.checkup import examine

    try:
        report = examine(store, say)
    except StoreUnavailable as error:
        yield problem("contents", error.message)
        return
    yield from (warning("contents", line) for line in report.warnings)
    yield from (problem("contents", line) for line in report.faults)
    if any("blob" in line for line in report.faults):
        yield warning(
            "contents",
            "what a damaged or missing blob belongs to cannot be used: put the blob folder of a backup over this one, "
            "or upload (train) it again, which also mends other versions of the same content, or delete it",
        )
    if not report.faults:
        yield ok("contents", "database, files, names and counts are whole")
    sys.stdout.flush()
