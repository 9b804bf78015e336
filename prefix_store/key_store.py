"""API keys: made, checked, listed, removed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prefix_store.backends.base import Backend
from prefix_store.errors import InvalidRequest, Unauthorized
from prefix_store.prefix import check_name
from prefix_store.tenants import SCOPES, ApiKey, key_id_of, new_key


class KeyStore:
    """API keys of all tenants."""

    def __init__(self, backend: Backend, clock: Callable[[], float]) -> None:
        self._backend = backend
        self._clock = clock

    def create(self, tenant: str, scopes: Iterable[str]) -> tuple[str, ApiKey]:
        """Makes a key; the first value is what its owner presents, and is seen only here."""
        check_name(tenant, "tenant")
        wanted = frozenset(scopes)
        if not wanted or not wanted <= set(SCOPES):
            raise InvalidRequest(f"scopes must be some of {', '.join(SCOPES)}", param="scopes")
        presented, key = new_key(tenant, wanted, self._clock())
        self._backend.add_key(key)
        return presented, key

    def authenticate(self, presented: str) -> ApiKey:
        """The key that was presented. Raises Unauthorized, whatever is wrong with it."""
        key_id = key_id_of(presented)
        key = self._backend.key(key_id) if key_id is not None else None
        if key is None or not key.matches(presented):
            raise Unauthorized("no such API key")
        return key

    def all(self) -> Sequence[ApiKey]:
        """Every key, oldest first."""
        return self._backend.keys()

    def remove(self, key_id: str) -> bool:
        """Whether there was such a key."""
        return self._backend.remove_key(key_id)

    def any(self) -> bool:
        """Whether any key exists: without one the server is open."""
        return bool(self._backend.keys())
