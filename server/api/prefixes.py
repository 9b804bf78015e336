"""/v1/prefixes: look, take away, edit, delete."""

from __future__ import annotations

import re
import zipfile
from contextlib import ExitStack
from io import BytesIO
from typing import Annotated, Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Depends, Query, Request
from fastapi.routing import APIRoute
from starlette.background import BackgroundTask
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Match
from starlette.types import Scope

from prefix_store.errors import InvalidRequest
from prefix_store.formats import peft
from prefix_store.prefix import NAME, Method, PrefixVersion
from server.api import conditions, queries, references, residency, schemas, views
from server.api.auth import Caller, Calling
from server.api.schemas import EditBody
from server.api.services import Services, Serving

FILTERS = ("after", "limit", "method", "shared")
# What routes have below a prefix: such an address is never that of a prefix, whatever the method.
BELOW = re.compile(
    r".+/(?:content|export|inspect|preload|release|rollback|sharing|train|verify|versions|aliases/[^/]*)"
)


class ReferenceRoute(APIRoute):
    """Takes any path as a reference, for one may hold a slash, but what is another route's."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Whether this route is asked for."""
        match, found = super().matches(scope)
        is_below = self.path.endswith("{ref:path}") and BELOW.fullmatch(found.get("path_params", {}).get("ref", ""))
        return (Match.NONE, {}) if is_below else (match, found)


router = APIRouter(prefix="/v1/prefixes", route_class=ReferenceRoute)
Limit = Annotated[int, Query(ge=1, le=1000)]


@router.get("")
async def page(
    request: Request,
    services: Serving,
    caller: Calling,
    after: str = "",
    limit: Limit = 100,
    method: Method | None = None,
    shared: bool = False,
) -> dict[str, Any]:
    """Current versions in order of name: the caller's, or what others share with it; filtered, if asked for.

    `after` need not be there any more: the order goes on behind it.
    """
    _check_place(after, shared=shared)
    notes = queries.metadata(request, FILTERS)

    def is_wanted(version: PrefixVersion) -> bool:
        return method in (None, version.method) and notes.items() <= version.metadata.items()

    prefixes = services.store.prefixes
    find = prefixes.page_shared if shared else prefixes.page
    versions = await to_thread.run_sync(find, caller.tenant, after, limit + 1, is_wanted)
    return views.page([views.prefix(version, caller.tenant) for version in versions], limit)


@router.get("/{ref:path}/export", dependencies=[Depends(queries.only_known)])
async def export(
    ref: str, services: Serving, caller: Calling, format: Literal["native", "peft"] = "native"
) -> Response:
    """The native file, or a PEFT adapter's two files in a zip."""
    version = await to_thread.run_sync(references.resolve, services, ref, caller)
    name = f"{version.name}-{version.version}"
    if format == "native":
        opened = ExitStack()
        path = await to_thread.run_sync(opened.enter_context, services.store.prefixes.file(version))
        closing = BackgroundTask(to_thread.run_sync, opened.close)
        return FileResponse(path, filename=f"{name}.safetensors", headers=conditions.etag(version), background=closing)
    archive = await to_thread.run_sync(_peft_archive, services, version)
    disposition = {"content-disposition": f'attachment; filename="{name}.zip"'}
    return Response(archive, media_type="application/zip", headers=disposition)


@router.get("/{ref:path}", dependencies=[Depends(queries.only_known)])
async def show(request: Request, ref: str, services: Serving, caller: Calling) -> Response:
    """One version, with its digest as ETag."""
    version = await to_thread.run_sync(references.resolve, services, ref, caller)
    if conditions.is_known(request.headers, version):
        return Response(status_code=304, headers=conditions.etag(version))
    return await to_thread.run_sync(whole, services, version, caller)


@router.patch("/{ref:path}", dependencies=[Depends(conditions.unconditional)])
async def edit(request: Request, ref: str, services: Serving, caller: Calling) -> Response:
    """Changes what may change of a version: its metadata, whether it is pinned, when it expires."""
    body = await schemas.read(request, EditBody)
    version = await to_thread.run_sync(_edit, services, ref, caller, body)
    return await to_thread.run_sync(whole, services, version, caller)


@router.delete("/{ref:path}")
async def delete(request: Request, ref: str, services: Serving, caller: Calling) -> dict[str, Any]:
    """Removes one version, or all of a bare name. What already runs with it goes on."""
    removed = await to_thread.run_sync(_delete, services, ref, caller, conditions.wanted(request.headers))
    versions = [version.version for version in removed]
    return {"id": removed[0].name, "object": "prefix", "deleted": True, "versions": versions}


def _check_place(after: str, *, shared: bool) -> None:
    """Raises InvalidRequest unless this could be what the last prefix of the page before is called."""
    parts = after.split("/") if shared else [after]
    if after and (len(parts) > 2 or not all(map(NAME.fullmatch, parts))):
        expected = "tenant/id" if shared else "id"
        raise InvalidRequest(f"after must be the {expected} of a prefix, got {after[:80]!r}", param="after")


def whole(services: Services, version: PrefixVersion, caller: Caller) -> JSONResponse:
    """All that there is to say about a version. Blocking."""
    record = services.store.prefixes.describe(version)
    return JSONResponse(views.prefix(version, caller.tenant, record), headers=conditions.etag(version))


def _edit(services: Services, ref: str, caller: Caller, body: EditBody) -> PrefixVersion:
    own = references.own(ref, caller)
    with references.changing(services, caller, own.name, ref):
        return services.store.prefixes.edit(own, body.changes(), caller.by)


def _delete(services: Services, ref: str, caller: Caller, if_match: str | None) -> list[PrefixVersion]:
    own = references.own(ref, caller)
    with references.changing(services, caller, own.name, ref):
        removed = services.store.prefixes.delete(own, if_match, caller.by)
    residency.end_outdated(services)
    return removed


def _peft_archive(services: Services, version: PrefixVersion) -> bytes:
    manifest, tensors = services.store.prefixes.read(version)
    files = peft.write(manifest, tensors, services.frozen.name, sliding_window=services.has_sliding_window)
    archive = BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as zipped:
        for filename, content in files.items():
            zipped.writestr(filename, content)
    return archive.getvalue()
