"""Requests with an `Idempotency-Key`: done once, answered as often as they come, for a day."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse

from prefix_store import answers
from prefix_store.answers import Claim
from prefix_store.backends.base import Transaction
from prefix_store.errors import InvalidRequest, StoreUnavailable
from server.api.auth import Caller
from server.api.services import Services

HEADER = "idempotency-key"
KEY = re.compile(r"[!-~]{1,255}")
REPLAYED = {"idempotent-replayed": "true"}


@dataclass(frozen=True)
class Reply:
    """An answer that can be kept."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)
    is_replayed: bool = False

    def response(self) -> JSONResponse:
        """The HTTP reply."""
        return JSONResponse(self.body, self.status, headers=self.headers | (REPLAYED if self.is_replayed else {}))


# Done in the transaction that makes the change, with the answer to it.
Keep = Callable[[Transaction, Reply], None]


def key_of(headers: Mapping[str, str]) -> str | None:
    """The request's key. Raises InvalidRequest for one that is none."""
    text = headers.get(HEADER)
    if text is None:
        return None
    key = text.strip().removeprefix('"').removesuffix('"')  # a string by the draft, and bare from most clients
    if not KEY.fullmatch(key):
        raise InvalidRequest("Idempotency-Key must be 1 to 255 visible ASCII characters", param=HEADER)
    return key


def answer(services: Services, caller: Caller, key: str | None, asked: Any, work: Callable[[Keep], Reply]) -> Reply:
    """What `work` answers, or what it answered to the same request before. Blocking.

    `asked`: JSON of all that matters in the request. A refusal is not kept. Raises KeyReused, StillRunning and what
    `work` raises.
    """
    if key is None:
        return work(lambda transaction, reply: None)
    fingerprint = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    found = services.store.answers.begin(caller.tenant, key, fingerprint)
    if not isinstance(found, Claim):
        return Reply(found["status"], found["body"], found["headers"], is_replayed=True)
    try:
        return work(lambda transaction, reply: _keep(transaction, found, reply))
    except BaseException:
        with suppress(StoreUnavailable):
            services.store.answers.forget(found)
        raise


def _keep(transaction: Transaction, claim: Claim, reply: Reply) -> None:
    answers.settle(transaction, claim, {"status": reply.status, "body": reply.body, "headers": reply.headers})
