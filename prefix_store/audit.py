"""The audit log: every change of the store, written in the transaction that makes it."""

from __future__ import annotations

import dataclasses
import itertools
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from prefix_store import layout
from prefix_store.backends.base import Backend, Transaction, walk

# Who acts when nobody says: whoever can open the store itself.
LOCAL = "local"
# Behind the moment, so that what one process did within a microsecond, or in one transaction, stays in order.
_NEXT = itertools.count()
# The action whose target is `NAME with READER, READER`: the only one that names another tenant.
SHARE, SHARED_WITH = "prefix.share", " with "


@dataclass(frozen=True)
class AuditEntry:
    """One change. `by`: `key ID`, `worker NAME` or `local`; `target`: what was changed, such as `support@3`."""

    at: float
    by: str
    tenant: str
    action: str
    target: str
    digest: str | None = None


def record(transaction: Transaction, by: str, tenant: str, action: str, target: str, digest: str | None = None) -> None:
    """Adds a line, kept if the transaction is."""
    entry = AuditEntry(transaction.now, by, tenant, action, target, digest)
    transaction.put(layout.audit(entry.at, f"{next(_NEXT):012x}{uuid.uuid4().hex[:12]}"), dataclasses.asdict(entry))


class AuditLog:
    """Reads what was recorded."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def entries(self, since: float = 0.0, tenant: str | None = None) -> Iterator[AuditEntry]:
        """What happened at `since` and later, oldest first."""
        for _, value in walk(self._backend, "audit/", after=layout.milliseconds(since)):
            if tenant in (None, value["tenant"]):
                yield AuditEntry(**value)
