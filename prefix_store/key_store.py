"""API keys: made, checked, rotated, listed, removed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from prefix_store import audit, layout
from prefix_store.audit import LOCAL
from prefix_store.backends.base import Backend, Transaction
from prefix_store.errors import Conflict, InvalidRequest, NotFound, Unauthorized
from prefix_store.prefix import check_name
from prefix_store.tenant_store import ensure
from prefix_store.tenants import SCOPES, ApiKey, key_id_of, new_key


class KeyStore:
    """API keys of all tenants."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def create(
        self, tenant: str, scopes: Iterable[str], lifetime: float | None = None, by: str = LOCAL
    ) -> tuple[str, ApiKey]:
        """Makes a key, good for `lifetime` seconds; the first value is what its owner presents, seen only here.

        Makes the tenant too, unless there is one. Raises InvalidName, InvalidRequest.
        """
        check_name(tenant, "tenant")
        wanted = frozenset(scopes)
        if not wanted or not wanted <= set(SCOPES):
            raise InvalidRequest(f"scopes must be some of {', '.join(SCOPES)}", param="scopes")

        def work(transaction: Transaction) -> tuple[str, ApiKey]:
            ensure(transaction, tenant)
            return _add(transaction, tenant, wanted, lifetime, by)

        return self._backend.write(work)

    def rotate(self, key_id: str, overlap: float, lifetime: float | None = None, by: str = LOCAL) -> tuple[str, ApiKey]:
        """Makes a key like this one; the old one is good for `overlap` seconds more at most.

        The new one is good for `lifetime` seconds, by default for as long as the old one was made for. Raises NotFound,
        Conflict for a key that has expired or was rotated before.
        """

        def work(transaction: Transaction) -> tuple[str, ApiKey]:
            data = transaction.get(layout.key(key_id))
            if data is None:
                raise NotFound(f"there is no key {key_id[:80]!r}")
            old = ApiKey.from_json(data)
            if old.has_expired(transaction.now):
                raise Conflict(f"key {old.id} has expired; make a new one")
            if old.successor is not None:
                raise Conflict(f"key {old.id} was rotated before; rotate its successor {old.successor}")
            inherited = old.expires_at - old.created_at if old.expires_at is not None else None
            audit.record(transaction, by, old.tenant, "key.rotate", old.id)
            presented, new = _add(transaction, old.tenant, old.scopes, inherited if lifetime is None else lifetime, by)
            end = transaction.now + overlap
            ends_at = end if old.expires_at is None else min(end, old.expires_at)
            ending = dataclasses.replace(old, expires_at=ends_at, successor=new.id)
            transaction.put(layout.key(old.id), ending.to_json())
            return presented, new

        return self._backend.write(work)

    def authenticate(self, presented: str) -> ApiKey:
        """The key that was presented. Raises Unauthorized, whatever is wrong with it."""
        key_id = key_id_of(presented)
        if key_id is not None:
            with self._backend.view() as view:
                data = view.get(layout.key(key_id))
                key = ApiKey.from_json(data) if data is not None else None
                if key is not None and key.matches(presented) and not key.has_expired(view.now):
                    return key
        raise Unauthorized("no such API key")

    def all(self) -> Sequence[ApiKey]:
        """Every key, expired or not, oldest first."""
        with self._backend.view() as view:
            keys = [ApiKey.from_json(data) for _, data in view.scan("key/")]
        return sorted(keys, key=lambda key: key.created_at)

    def remove(self, key_id: str, by: str = LOCAL) -> bool:
        """Whether there was such a key."""

        def work(transaction: Transaction) -> bool:
            data = transaction.get(layout.key(key_id))
            if data is not None:
                transaction.delete(layout.key(key_id))
                audit.record(transaction, by, data["tenant"], "key.remove", key_id)
            return data is not None

        return self._backend.write(work)

    def any(self) -> bool:
        """Whether any key exists: without one the server is open."""
        with self._backend.view() as view:
            return bool(view.scan("key/", limit=1))


def _add(
    transaction: Transaction, tenant: str, scopes: frozenset[str], lifetime: float | None, by: str
) -> tuple[str, ApiKey]:
    now = transaction.now
    presented, key = new_key(tenant, scopes, now, now + lifetime if lifetime is not None else None)
    transaction.put(layout.key(key.id), key.to_json())
    audit.record(transaction, by, tenant, "key.create", key.id)
    return presented, key
