"""/v1/prefixes: upload, look, take away, delete."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Query, Request
from starlette.datastructures import FormData, UploadFile
from starlette.responses import FileResponse, JSONResponse, Response

from prefix_store import codec
from prefix_store.errors import AntefixError, InvalidRequest
from prefix_store.formats import peft
from prefix_store.prefix import PrefixManifest, PrefixVersion, check_template
from prefix_store.safetensors_file import read_header
from prefix_store.tensors import PrefixTensors, check_fits
from server.api import references, views
from server.api.auth import Caller, Calling
from server.api.services import Services, Serving
from server.engine.prefix_loader import served_tensor

PARTS = ("id", "file", "config", "template")
router = APIRouter(prefix="/v1/prefixes")
Limit = Annotated[int, Query(ge=1, le=1000)]


@router.post("")
async def upload(request: Request, services: Serving, caller: Calling) -> Response:
    """Takes a native file, or a PEFT adapter as `file`, `config` and `template`; keeps nothing that does not fit."""
    try:
        async with request.form(max_files=3, max_fields=4, max_part_size=peft.MAX_CONFIG + 1) as form:
            _check_parts(form)
            name = references.new_name(services, _name(form))
            config, template, file = await _config(form), _template(form), _file(form)
            version = await to_thread.run_sync(_keep, services, caller, name, config, template, file)
    except UnicodeError:
        services.metrics.upload_rejected.labels(InvalidRequest.code).inc()
        raise InvalidRequest("the form's text parts must be UTF-8") from None
    except AntefixError as error:
        services.metrics.upload_rejected.labels(error.code).inc()
        raise
    return JSONResponse(views.prefix(version), 201, headers=_etag(version))


@router.get("")
async def page(services: Serving, caller: Calling, after: str = "", limit: Limit = 100) -> dict[str, Any]:
    """The caller's prefixes, current versions, in order of name."""
    versions = await to_thread.run_sync(services.store.prefixes.page, caller.tenant, after, limit + 1)
    return views.page([views.prefix(version) for version in versions], limit)


@router.get("/{ref:path}/export")
async def export(
    ref: str, services: Serving, caller: Calling, format: Literal["native", "peft"] = "native"
) -> Response:
    """The native file, or a PEFT adapter's two files in a zip."""
    version = await to_thread.run_sync(references.resolve, services, ref, caller)
    name = f"{version.name}-{version.version}"
    if format == "native":
        path = services.store.prefixes.path(version)
        return FileResponse(path, filename=f"{name}.safetensors", headers=_etag(version))
    archive = await to_thread.run_sync(_peft_archive, services, version)
    disposition = {"content-disposition": f'attachment; filename="{name}.zip"'}
    return Response(archive, media_type="application/zip", headers=disposition)


@router.get("/{ref:path}")
async def show(request: Request, ref: str, services: Serving, caller: Calling) -> Response:
    """One version, with its digest as ETag."""
    version = await to_thread.run_sync(references.resolve, services, ref, caller)
    if _matches(request.headers.get("if-none-match", ""), version.digest):
        return Response(status_code=304, headers=_etag(version))
    return JSONResponse(views.prefix(version), headers=_etag(version))


@router.delete("/{ref:path}")
async def delete(ref: str, services: Serving, caller: Calling) -> dict[str, Any]:
    """Removes one version, or all of a bare name. What already runs with it goes on."""
    removed = await to_thread.run_sync(_delete, services, ref, caller)
    versions = [version.version for version in removed]
    return {"id": removed[0].name, "object": "prefix", "deleted": True, "versions": versions}


def _delete(services: Services, ref: str, caller: Caller) -> list[PrefixVersion]:
    references.resolve(services, ref, caller)
    return services.store.prefixes.delete(references.parse(ref, caller))


def _check_parts(form: FormData) -> None:
    names = [name for name, _ in form.multi_items()]
    for part in names:
        if part not in PARTS:
            raise InvalidRequest(f"unknown part {part[:80]!r}; the parts are {', '.join(PARTS)}", param=part[:80])
        if names.count(part) > 1:
            raise InvalidRequest(f"the part {part!r} is given more than once", param=part)


def _name(form: FormData) -> str:
    value = form.get("id")
    if not isinstance(value, str):
        raise InvalidRequest("the form needs a text part 'id'", param="id")
    return value


def _file(form: FormData) -> UploadFile:
    value = form.get("file")
    if not isinstance(value, UploadFile):
        raise InvalidRequest("the form needs a part 'file' with a file name", param="file")
    return value


async def _config(form: FormData) -> bytes | None:
    """adapter_config.json, as a file or a plain field. One byte over the limit is enough for the format to refuse."""
    value = form.get("config")
    if isinstance(value, UploadFile):
        return await value.read(peft.MAX_CONFIG + 1)
    return value.encode() if value is not None else None


def _template(form: FormData) -> str | None:
    value = form.get("template")
    if isinstance(value, UploadFile):
        raise InvalidRequest("the part 'template' is a text, not a file", param="template")
    return None if value is None else check_template(value, param="template")


def _keep(
    services: Services, caller: Caller, name: str, config: bytes | None, template: str | None, file: UploadFile
) -> PrefixVersion:
    """Checks the file against the model and only then saves it."""
    with tempfile.TemporaryDirectory(prefix="antefix-") as folder:
        path = Path(folder, "upload")
        with path.open("wb") as copy:
            shutil.copyfileobj(file.file, copy)
        manifest, tensors = _decode(services, config, template, path)
    frozen = services.frozen
    check_fits(manifest, frozen.geometry, frozen.digest, frozen.context_length)
    served_tensor(manifest, tensors, frozen.dtype)  # for what it refuses
    return services.store.prefixes.save(caller.tenant, name, manifest, tensors)


def _decode(
    services: Services, config: bytes | None, template: str | None, path: Path
) -> tuple[PrefixManifest, PrefixTensors]:
    if config is not None or peft.TENSOR in read_header(path).shapes:
        manifest, tensors = peft.read(config, path, services.frozen.geometry)
        return dataclasses.replace(manifest, template=template), tensors
    if template is not None:
        raise InvalidRequest("a native file carries its own template; this part goes with PEFT files", param="template")
    return codec.decode(path)


def _peft_archive(services: Services, version: PrefixVersion) -> bytes:
    manifest, tensors = services.store.prefixes.read(version)
    files = peft.write(manifest, tensors, services.frozen.name, sliding_window=services.has_sliding_window)
    archive = BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as zipped:
        for filename, content in files.items():
            zipped.writestr(filename, content)
    return archive.getvalue()


def _etag(version: PrefixVersion) -> dict[str, str]:
    return {"etag": f'"{version.digest}"'}


def _matches(if_none_match: str, digest: str) -> bool:
    tags = {tag.strip().removeprefix("W/") for tag in if_none_match.split(",")}
    return bool(tags & {"*", f'"{digest}"'})
