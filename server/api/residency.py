"""POST /v1/prefixes/{ref}/preload and /release: what stays on the device whether or not a request reads it.

A preload is of one version, and of the tenant that asked for it: several may hold the same content, which lies there
once. It ends when it is released, when its version is deleted or has expired, or when its tenant may no longer read it.
"""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

from anyio import to_thread
from fastapi import APIRouter, Depends, Request

from prefix_store.errors import PrefixNotFound, StoreUnavailable
from prefix_store.prefix import PrefixRef, PrefixVersion
from server.api import conditions, references
from server.api.auth import Caller, Calling
from server.api.services import Services, Serving

router = APIRouter(prefix="/v1/prefixes")
UNCONDITIONAL = [Depends(conditions.unconditional)]


class Holder(NamedTuple):
    """Who asked for what: a tenant for one version, its own or another's."""

    tenant: str
    ref: PrefixRef


@router.post("/{ref:path}/preload", dependencies=UNCONDITIONAL)
async def preload(request: Request, ref: str, services: Serving, caller: Calling) -> dict[str, Any]:
    """Brings a version onto the device, where it stays; answers when it is there."""
    await request.body()
    await to_thread.run_sync(end_outdated, services)  # what other processes deleted must not take the room
    prefix = await references.load(services, ref, caller)
    version = prefix.version
    there = services.loop.preload(prefix.payload, Holder(caller.tenant, version.ref))
    services.loader.keep(version.digest)
    try:
        await asyncio.wrap_future(there)
    except BaseException:
        end(services, version, caller.tenant)
        raise
    return _shown(version, caller, preloaded=True)


@router.post("/{ref:path}/release", dependencies=UNCONDITIONAL)
async def release(request: Request, ref: str, services: Serving, caller: Calling) -> dict[str, Any]:
    """Lets go of a version; its slots are free once nobody reads or holds it. Harmless for one that is not held."""
    await request.body()
    version = await to_thread.run_sync(references.resolve, services, ref, caller)
    end(services, version, caller.tenant)
    return _shown(version, caller, preloaded=False)


def end(services: Services, version: PrefixVersion, tenant: str) -> None:
    """Ends one tenant's preload of a version, if there is one."""
    _end(services, version.digest, Holder(tenant, version.ref))


def end_outdated(services: Services) -> None:
    """Ends the preloads of versions that their tenants can no longer have. Blocking."""
    for digest, holders in services.loop.preloaded().items():
        for holder in holders:
            assert isinstance(holder, Holder)
            try:
                services.store.prefixes.resolve(holder.ref, holder.tenant)
            except PrefixNotFound:
                _end(services, digest, holder)
            except StoreUnavailable:
                return


def _end(services: Services, digest: str, holder: Holder) -> None:
    services.loop.release(digest, holder)
    if digest not in services.loop.preloaded():
        services.loader.free(digest)


def _shown(version: PrefixVersion, caller: Caller, *, preloaded: bool) -> dict[str, Any]:
    named = {"id": version.name, "object": "prefix.residency", "version": version.version, "digest": version.digest}
    owner = {} if version.tenant == caller.tenant else {"tenant": version.tenant}
    return owner | named | {"preloaded": preloaded}
