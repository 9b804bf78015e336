"""What a prefix's name stands for: its versions, which of them is current, its aliases, and who else may use it."""

from __future__ import annotations

from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from prefix_store import layout
from prefix_store.errors import InvalidName
from prefix_store.name_records import NameRecord
from prefix_store.prefix import PrefixRef, check_name
from server.api import conditions, prefixes, queries, references, schemas, views
from server.api.auth import Caller, Calling
from server.api.schemas import RollbackBody, SharingBody, VersionBody
from server.api.services import Services, Serving

router = APIRouter(prefix="/v1/prefixes")
UNCONDITIONAL = [Depends(conditions.unconditional)]
Limit = Annotated[int, Query(ge=1, le=1000)]
Number = Annotated[int, Query(ge=0, le=999_999_999)]


@router.get("/{ref:path}/versions", dependencies=[Depends(queries.only_known)])
async def page(ref: str, services: Serving, caller: Calling, after: Number = 0, limit: Limit = 100) -> dict[str, Any]:
    """A name's versions with numbers above `after`, in order."""
    return await to_thread.run_sync(_page, services, caller, ref, after, limit)


@router.post("/{name}/rollback", dependencies=UNCONDITIONAL)
async def roll_back(request: Request, name: str, services: Serving, caller: Calling) -> Response:
    """Makes another version the current one, by default the highest below it."""
    body = await schemas.read(request, RollbackBody)
    return await to_thread.run_sync(_roll_back, services, caller, name, body.version)


@router.put("/{name}/aliases/{alias}", dependencies=UNCONDITIONAL)
async def set_alias(request: Request, name: str, alias: str, services: Serving, caller: Calling) -> Response:
    """Makes `name@alias` mean a version, from one moment to the next."""
    body = await schemas.read(request, VersionBody)
    return await to_thread.run_sync(_set_alias, services, caller, name, alias, body.version)


@router.delete("/{name}/aliases/{alias}", dependencies=UNCONDITIONAL)
async def remove_alias(name: str, alias: str, services: Serving, caller: Calling) -> dict[str, Any]:
    """Makes `name@alias` mean nothing."""
    await to_thread.run_sync(_remove_alias, services, caller, name, alias)
    return {"id": name, "object": "prefix.alias", "alias": alias, "deleted": True}


@router.get("/{name}/sharing")
async def sharing(name: str, services: Serving, caller: Calling) -> dict[str, Any]:
    """Whom the caller shares a name with."""
    return views.sharing(name, await to_thread.run_sync(_shared, services, caller, name))


@router.put("/{name}/sharing", dependencies=UNCONDITIONAL)
async def share(request: Request, name: str, services: Serving, caller: Calling) -> dict[str, Any]:
    """Shares a name with exactly these tenants, or with all."""
    body = await schemas.read(request, SharingBody)
    return views.sharing(name, await to_thread.run_sync(_share, services, caller, name, body))


def _page(services: Services, caller: Caller, text: str, after: int, limit: int) -> dict[str, Any]:
    ref = PrefixRef.parse(text, caller.tenant)
    if ref.version is not None or ref.alias is not None:
        raise InvalidName(f"versions are a name's, got {text[:80]!r}", param="prefix_id")
    record = services.store.prefixes.describe(references.resolve(services, text, caller))
    found = services.store.prefixes.versions(ref.tenant, ref.name, after, limit + 1)
    return views.page([views.prefix(version, caller.tenant, record) for version in found], limit)


def _roll_back(services: Services, caller: Caller, name: str, number: int | None) -> Response:
    with references.changing(services, caller, name, _text(name, number)):
        found = services.store.prefixes.make_current(caller.tenant, check_name(name), number, caller.by)
    return prefixes.whole(services, found, caller)


def _set_alias(services: Services, caller: Caller, name: str, alias: str, number: int) -> Response:
    with references.changing(services, caller, name, _text(name, number)):
        found = services.store.prefixes.set_alias(caller.tenant, check_name(name), alias, number, caller.by)
    return prefixes.whole(services, found, caller)


def _remove_alias(services: Services, caller: Caller, name: str, alias: str) -> None:
    with references.changing(services, caller, name, f"{name}@{alias}"):
        services.store.prefixes.remove_alias(caller.tenant, check_name(name), alias, caller.by)


def _shared(services: Services, caller: Caller, name: str) -> NameRecord:
    with references.missing_as(name):
        return services.store.prefixes.describe_name(caller.tenant, check_name(name))


def _share(services: Services, caller: Caller, name: str, body: SharingBody) -> NameRecord:
    readers = [layout.EVERYONE] if body.tenants == "all" else body.tenants
    with references.changing(services, caller, name):
        return services.store.prefixes.share(caller.tenant, check_name(name), readers, caller.by)


def _text(name: str, number: int | None) -> str:
    return name if number is None else f"{name}@{number}"
