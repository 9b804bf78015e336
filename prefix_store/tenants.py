"""Tenants and their API keys. A key is shown once; the store keeps its hash."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass

DEFAULT_TENANT = "default"
SCOPES = ("generate", "prefix:read", "prefix:write", "train", "admin")
KEY = re.compile(r"afx_([a-z0-9]{8})_([A-Za-z0-9_-]{43})")
_ID_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"


@dataclass(frozen=True)
class ApiKey:
    """A stored key: the public `id` appears in lists and logs; `secret_hash` is sha256 of the whole key.

    256 random bits need no slow hash.
    """

    id: str
    tenant: str
    secret_hash: str
    scopes: frozenset[str]
    created_at: float

    def matches(self, presented: str) -> bool:
        """Compares in constant time."""
        return hmac.compare_digest(self.secret_hash, hash_key(presented))

    def allows(self, scope: str) -> bool:
        """`admin` includes every scope."""
        return scope in self.scopes or "admin" in self.scopes


def new_key(tenant: str, scopes: frozenset[str], created_at: float) -> tuple[str, ApiKey]:
    """Makes a key and its record; the first value is the only time the secret is seen."""
    key_id = "".join(secrets.choice(_ID_ALPHABET) for _ in range(8))
    presented = f"afx_{key_id}_{secrets.token_urlsafe(32)}"
    return presented, ApiKey(key_id, tenant, hash_key(presented), scopes, created_at)


def hash_key(presented: str) -> str:
    """sha256 of a presented key, in hex."""
    return hashlib.sha256(presented.encode()).hexdigest()


def key_id_of(presented: str) -> str | None:
    """The public id inside a presented key, or None if it is not shaped like a key."""
    match = KEY.fullmatch(presented)
    return match.group(1) if match else None
