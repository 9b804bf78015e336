"""/v1/models: the base model and the caller's prefixes, each a model of its own to clients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request

from prefix_store.errors import InvalidRequest
from prefix_store.prefix import PrefixVersion
from server.api import conditions, model_names, references, residency
from server.api.auth import Caller, Calling
from server.api.services import Services, Serving

PAGE = 1000
router = APIRouter(prefix="/v1/models")


@router.get("")
async def models(services: Serving, caller: Calling) -> dict[str, Any]:
    """All of them, the base model first; read from the store each time, so a new one is there at once."""
    return {"object": "list", "data": await to_thread.run_sync(_all, services, caller)}


@router.get("/{model:path}")
async def show(model: str, services: Serving, caller: Calling) -> dict[str, Any]:
    """One, under the name that it was asked for by."""
    version = await to_thread.run_sync(model_names.resolve, model, services, caller)
    if version is not None:
        return _card(model, version, services)
    model_names.check_bare(services)
    return _base(services)


@router.delete("/{model:path}")
async def delete(request: Request, model: str, services: Serving, caller: Calling) -> dict[str, Any]:
    """Removes one version of a prefix, or all of a bare name, as `DELETE /v1/prefixes` does."""
    await to_thread.run_sync(_delete, model, services, caller, conditions.wanted(request.headers))
    return {"id": model, "object": "model", "deleted": True}


def _all(services: Services, caller: Caller) -> list[dict[str, Any]]:
    base = [] if services.require_prefix else [_base(services)]
    return base + [_card(version.name, version, services) for version in _versions(services, caller.tenant)]


def _versions(services: Services, tenant: str) -> Iterator[PrefixVersion]:
    """Current versions, without those made for another base model, which a store may hold too."""
    after = ""
    while page := services.store.prefixes.page(tenant, after, PAGE):
        yield from (version for version in page if version.base_digest in (None, services.frozen.digest))
        after = page[-1].name


def _delete(model: str, services: Services, caller: Caller, if_match: str | None) -> None:
    if model_names.resolve(model, services, caller) is None:
        raise InvalidRequest("the base model cannot be deleted; prefixes can", param="model")
    with model_names.known_as(model):
        own = references.own(model, caller)  # what is shared with the caller it may use and not delete
        with references.changing(services, caller, own.name):
            services.store.prefixes.delete(own, if_match, caller.by)
    residency.end_outdated(services)


def _base(services: Services) -> dict[str, Any]:
    frozen = services.frozen
    return {
        "id": frozen.name,
        "object": "model",
        "created": services.started,
        "owned_by": "antefix",
        "root": frozen.name,
        "parent": None,
        "max_model_len": frozen.context_length,
        "digest": frozen.digest,
    }


def _card(name: str, version: PrefixVersion, services: Services) -> dict[str, Any]:
    """`max_model_len` is what the prefix leaves of the context."""
    frozen = services.frozen
    return {
        "id": name,
        "object": "model",
        "created": int(version.created_at),
        "owned_by": version.tenant,
        "root": str(version.ref),
        "parent": frozen.name,
        "max_model_len": frozen.context_length - version.virtual_tokens,
        "version": version.version,
        "digest": version.digest,
    }
