"""Who may call what. Every route needs a key unless it is on the open list; a route nobody listed needs `admin`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import structlog
from fastapi import Depends, Request

from prefix_store.audit import LOCAL
from prefix_store.errors import Forbidden, Unauthorized
from prefix_store.tenants import DEFAULT_TENANT, ApiKey, hash_key
from server.api.services import Serving
from server.loopback import is_loopback

if TYPE_CHECKING:
    from prefix_store.key_store import KeyStore
    from server.api.recent import Recent

KEY = "key"
OPEN = frozenset({"/healthz", "/readyz", "/health"})
SCOPES = {
    ("POST", "/generate"): "generate",
    ("POST", "/v1/completions"): "generate",
    ("POST", "/v1/chat/completions"): "generate",
    ("GET", "/v1/models"): "generate",
    ("GET", "/v1/models/{model:path}"): "generate",
    ("DELETE", "/v1/models/{model:path}"): "prefix:write",
    ("POST", "/tokenize"): "generate",
    ("POST", "/detokenize"): "generate",
    ("GET", "/tokenizer_info"): "generate",
    ("GET", "/openapi.json"): "generate",
    ("GET", "/v1/model"): "prefix:read",
    ("POST", "/v1/prefixes"): "prefix:write",
    ("GET", "/v1/prefixes"): "prefix:read",
    ("GET", "/v1/prefixes/{ref:path}"): "prefix:read",
    ("GET", "/v1/prefixes/{ref:path}/export"): "prefix:read",
    ("PUT", "/v1/prefixes/{name}/content"): "prefix:write",
    ("PATCH", "/v1/prefixes/{ref:path}"): "prefix:write",
    ("GET", "/v1/prefixes/{ref:path}/inspect"): "prefix:read",
    ("POST", "/v1/prefixes/{ref:path}/verify"): "generate",
    # room on the device is taken from every tenant, which no right over prefixes of one's own includes
    ("POST", "/v1/prefixes/{ref:path}/preload"): "admin",
    ("POST", "/v1/prefixes/{ref:path}/release"): "admin",
    ("DELETE", "/v1/prefixes/{ref:path}"): "prefix:write",
    ("GET", "/v1/prefixes/{ref:path}/versions"): "prefix:read",
    ("POST", "/v1/prefixes/{name}/rollback"): "prefix:write",
    ("PUT", "/v1/prefixes/{name}/aliases/{alias}"): "prefix:write",
    ("DELETE", "/v1/prefixes/{name}/aliases/{alias}"): "prefix:write",
    ("GET", "/v1/prefixes/{name}/sharing"): "prefix:read",
    ("PUT", "/v1/prefixes/{name}/sharing"): "prefix:write",
    ("POST", "/v1/prefixes/{name}/train"): "train",
    ("GET", "/v1/jobs"): "train",
    ("GET", "/v1/jobs/{job_id}"): "train",
    ("GET", "/v1/jobs/{job_id}/events"): "train",
    ("GET", "/v1/jobs/{job_id}/report"): "train",
    ("POST", "/v1/jobs/{job_id}/cancel"): "train",
    ("POST", "/v1/jobs/{job_id}/pause"): "train",
    ("POST", "/v1/jobs/{job_id}/resume"): "train",
    ("POST", "/v1/files"): "train",
    ("GET", "/v1/files"): "train",
    ("GET", "/v1/files/{file_id}"): "train",
    ("DELETE", "/v1/files/{file_id}"): "train",
    ("GET", "/v1/files/{file_id}/content"): "train",
    ("POST", "/v1/fine_tuning/jobs"): "train",
    ("GET", "/v1/fine_tuning/jobs"): "train",
    ("GET", "/v1/fine_tuning/jobs/{job_id}"): "train",
    ("GET", "/v1/fine_tuning/jobs/{job_id}/events"): "train",
    ("GET", "/v1/fine_tuning/jobs/{job_id}/checkpoints"): "train",
    ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel"): "train",
    ("POST", "/v1/fine_tuning/jobs/{job_id}/pause"): "train",
    ("POST", "/v1/fine_tuning/jobs/{job_id}/resume"): "train",
    ("GET", "/metrics"): "metrics",
}


@dataclass(frozen=True)
class Caller:
    """Whose request this is. `key_id` is None in open mode."""

    tenant: str
    key_id: str | None = None

    @property
    def by(self) -> str:
        """Who this is in the audit log."""
        return LOCAL if self.key_id is None else f"key {self.key_id}"


class Gate:
    """Checks keys. Without any key on loopback it is open, with one tenant; the first key closes it for good."""

    def __init__(self, keys: KeyStore, recent: Recent, *, is_loopback: bool) -> None:
        self._keys = keys
        self._recent = recent
        self._open = is_loopback

    async def admit(self, request: Request, scope: str) -> Caller:
        """The caller behind a request's key. Raises Unauthorized, Forbidden or StoreUnavailable.

        While the store is away, who was lately let in may still generate and look, but change nothing.
        """
        changes = scope != "generate" and request.method != "GET"
        if self._open:
            self._open = not await self._recent.ask(KEY, None, self._keys.any, fresh=changes)
        if self._open:
            _refuse_web_pages(request)
            return Caller(DEFAULT_TENANT)
        presented = presented_key(request)
        key = await self._find(presented, fresh=changes)
        if not key.allows(scope):
            raise Forbidden(f"this API key lacks the scope {scope!r}")
        return Caller(key.tenant, key.id)

    async def _find(self, presented: str | None, *, fresh: bool) -> ApiKey:
        if presented is None:
            raise Unauthorized("an API key is needed: Authorization: Bearer afx_… or x-api-key: afx_…")
        return await self._recent.ask(
            KEY,
            hash_key(presented),
            lambda: self._keys.authenticate(presented),
            is_good=lambda key: not key.has_expired(time.time()),
            fresh=fresh,
        )


def _refuse_web_pages(request: Request) -> None:
    """Raises Forbidden for what a browser sends on behalf of a page from elsewhere, which needs no key to do so.

    A foreign name in Host is a page that has pointed its own name at this machine (DNS rebinding).
    """
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    foreign_page = origin is not None and origin.partition("://")[2] != host
    crossing = request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
    if foreign_page or crossing or not is_loopback(_name(host)):
        raise Forbidden(
            "without API keys this server answers only who calls it by a loopback address, and no web page from "
            "elsewhere; for all others make a key: antefix key new --tenant default --scope admin"
        )


def _name(host: str) -> str:
    """The name or address in a Host header; nothing for what is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def presented_key(request: Request) -> str | None:
    """The key in the headers, as it came."""
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else request.headers.get("x-api-key")


async def authorise(request: Request, services: Serving) -> Caller | None:
    """The app-wide dependency; None only for the open list."""
    path = request.scope["route"].path
    if path in OPEN:
        return None
    scope = SCOPES.get((request.method, path), "admin")
    caller = await services.gate.admit(request, scope)
    structlog.contextvars.bind_contextvars(tenant=caller.tenant, key=caller.key_id)
    request.state.rate_headers = partial(services.rates.headers, caller.tenant)  # for `Exchange`, once it answers
    await services.rates.count_request(caller.tenant)
    return caller


Calling = Annotated[Caller, Depends(authorise)]
