"""Requests that may come again: a client that saw no answer repeats one under its `Idempotency-Key`."""

from __future__ import annotations

import hashlib
import uuid
from dataclasses import dataclass
from typing import Any

from prefix_store import layout
from prefix_store.backends.base import Backend, Transaction
from prefix_store.errors import KeyReused, StillRunning

KEPT_SECONDS = 86400.0
# A server that was killed while it answered blocks a repetition for as long.
CLAIM_SECONDS = 300.0


@dataclass(frozen=True)
class Claim:
    """The right to answer a request, which `settle` uses up. `key` is its record's."""

    key: str
    fingerprint: str
    id: str


class Answers:
    """What was answered to requests that have an Idempotency-Key, for a day."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def begin(self, tenant: str, request: str, fingerprint: str) -> Claim | Any:
        """The answer to the tenant's request of this key if there is one, else a claim to answer it.

        `fingerprint` stands for all that was asked. Raises KeyReused, StillRunning.
        """
        key = layout.once(tenant, hashlib.sha256(request.encode()).hexdigest())
        claim = Claim(key, fingerprint, uuid.uuid4().hex)

        def work(transaction: Transaction) -> Claim | Any:
            found = transaction.get(key)
            if found is None or found["until"] <= transaction.now:
                until = transaction.now + CLAIM_SECONDS
                transaction.put(key, {"fingerprint": fingerprint, "until": until, "claim": claim.id})
                return claim
            if found["fingerprint"] != fingerprint:
                raise KeyReused("this Idempotency-Key came with another request before; make a new one")
            if "answer" not in found:
                raise StillRunning("the request of this Idempotency-Key is being answered")
            return found["answer"]

        return self._backend.write(work)

    def forget(self, claim: Claim) -> None:
        """Gives a claim back: the request was refused, and may come again."""

        def work(transaction: Transaction) -> None:
            if is_ours(transaction, claim):
                transaction.delete(claim.key)

        self._backend.write(work)


def settle(transaction: Transaction, claim: Claim, answer: Any) -> None:
    """Keeps the answer, if the transaction is kept. Raises StillRunning for a claim that another has taken over."""
    if not is_ours(transaction, claim):
        raise StillRunning("the request of this Idempotency-Key is being answered")
    until = transaction.now + KEPT_SECONDS
    transaction.put(claim.key, {"fingerprint": claim.fingerprint, "until": until, "answer": answer})


def is_ours(transaction: Transaction, claim: Claim) -> bool:
    """Whether nobody else has taken the claim over."""
    found = transaction.get(claim.key)
    return found is not None and found.get("claim") == claim.id
