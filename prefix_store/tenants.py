"""Tenants, their quotas and their API keys. A key is shown once; the store keeps its hash."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field
from typing import Any

from prefix_store.errors import InvalidRequest
from prefix_store.jobs import JobStatus

DEFAULT_TENANT = "default"
# `metrics` sees the numbers of all tenants, and nothing else; `admin` includes every scope.
SCOPES = ("generate", "prefix:read", "prefix:write", "train", "metrics", "admin")
TENANT_SCOPES = ("generate", "prefix:read", "prefix:write", "train")  # of what is the tenant's own
KEY = re.compile(r"afx_([a-z0-9]{8})_([A-Za-z0-9_-]{43})")
_ID_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"


@dataclass(frozen=True)
class Quotas:
    """The most that a tenant may have or ask for; None sets no bound.

    `prefixes` counts names, `bytes` the files of all their versions and uploaded ones, `jobs` those that
    have not ended.
    """

    prefixes: int | None = None
    bytes: int | None = None
    jobs: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_sequences: int | None = None

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value is not None and (type(value) is not int or not 0 <= value < 2**53):
                raise InvalidRequest(f"{name} must be a natural number, got {str(value)[:40]}", param=name)


@dataclass(frozen=True)
class Tenant:
    """Whose prefixes, jobs and keys they are."""

    name: str
    created_at: float
    quotas: Quotas = field(default_factory=Quotas)


@dataclass(frozen=True)
class Usage:
    """What a tenant has: names, versions, the bytes of their files and of those uploaded, and jobs by state.

    `last_job` is the number of its newest job.
    """

    prefixes: int = 0
    versions: int = 0
    bytes: int = 0
    last_job: int = 0
    jobs: dict[str, int] = field(default_factory=dict)

    @property
    def unfinished_jobs(self) -> int:
        """Those that still want something of a worker."""
        return sum(count for status, count in self.jobs.items() if not JobStatus(status).is_final)


@dataclass(frozen=True)
class ApiKey:
    """A stored key: the public `id` appears in lists and logs; `secret_hash` is sha256 of the whole key.

    256 random bits need no slow hash. `expires_at` is in seconds of the store's clock. `successor` is the id of the
    key that it was rotated to.
    """

    id: str
    tenant: str
    secret_hash: str
    scopes: frozenset[str]
    created_at: float
    expires_at: float | None = None
    successor: str | None = None

    def matches(self, presented: str) -> bool:
        """Compares in constant time."""
        return hmac.compare_digest(self.secret_hash, hash_key(presented))

    def allows(self, scope: str) -> bool:
        """`admin` includes every scope."""
        return scope in self.scopes or "admin" in self.scopes

    def has_expired(self, now: float) -> bool:
        """Whether it is no longer good."""
        return self.expires_at is not None and self.expires_at <= now

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, as the store keeps it."""
        return {**dataclasses.asdict(self), "scopes": sorted(self.scopes)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ApiKey:
        """Reads `to_json`'s object."""
        return cls(**{**data, "scopes": frozenset(data["scopes"])})


def new_key(
    tenant: str, scopes: frozenset[str], created_at: float, expires_at: float | None = None
) -> tuple[str, ApiKey]:
    """Makes a key and its record; the first value is the only time the secret is seen."""
    key_id = "".join(secrets.choice(_ID_ALPHABET) for _ in range(8))
    presented = f"afx_{key_id}_{secrets.token_urlsafe(32)}"
    return presented, ApiKey(key_id, tenant, hash_key(presented), scopes, created_at, expires_at)


def hash_key(presented: str) -> str:
    """sha256 of a presented key, in hex."""
    return hashlib.sha256(presented.encode()).hexdigest()


def key_id_of(presented: str) -> str | None:
    """The public id inside a presented key, or None if it is not shaped like a key."""
    match = KEY.fullmatch(presented)
    return match.group(1) if match else None
