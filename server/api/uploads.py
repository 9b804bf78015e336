"""Prefixes that come in: by a form, as browsers send it, or as the bare bytes of a file."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from anyio import to_thread
from fastapi import APIRouter, Request
from starlette.responses import Response

from prefix_store import codec
from prefix_store.backends.base import Transaction
from prefix_store.errors import AntefixError, InvalidPrefix, InvalidRequest
from prefix_store.formats import peft
from prefix_store.prefix import LONGEST_TEMPLATE, PrefixManifest, PrefixVersion, check_metadata, check_template
from prefix_store.prefixes import check_lifetime
from prefix_store.safetensors_file import read_header, strict_json
from prefix_store.tensors import PrefixTensors
from server.api import conditions, form, queries, references, repeats, views
from server.api.auth import Caller, Calling
from server.api.receiving import Received, receive
from server.api.repeats import Keep, Reply
from server.api.services import Services, Serving
from server.engine.prefix_loader import served_tensors

# The form's parts besides the file, and how many bytes each may have: one more of a config is the format's to refuse.
PARTS = {
    "id": 1024,
    "config": peft.MAX_CONFIG + 1,
    "template": 4 * (LONGEST_TEMPLATE + 1),
    "metadata": 65_536,
    "ttl_seconds": 64,
}
SECONDS = re.compile(r"[0-9]{1,10}(\.[0-9]{1,6})?")
router = APIRouter(prefix="/v1/prefixes")


@dataclass(frozen=True)
class Upload:
    """What is to be stored, and as what."""

    name: str
    file: Received
    config: bytes | None = None
    template: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    lifetime: float | None = None
    if_match: str | None = None

    def asked(self) -> list[object]:
        """All that matters in it, for two uploads to be the same."""
        config = hashlib.sha256(self.config).hexdigest() if self.config is not None else None
        given = [self.template, self.metadata, self.lifetime, self.if_match]
        return ["upload", self.name, self.file.digest, config, *given]


@router.post("")
async def upload(request: Request, services: Serving, caller: Calling) -> Response:
    """Takes a native file, or a PEFT adapter as `file`, `config` and `template`; keeps nothing that does not fit."""
    async with receiving(services) as path:
        key, if_match = repeats.key_of(request.headers), conditions.wanted(request.headers)
        found = await form.read(request.headers, request.stream(), PARTS, path)
        conditions.check_digest(request.headers, found.file.digest, found.body_digest)
        texts = {name: _text(name, data) for name, data in found.fields.items() if name != "config"}
        if "id" not in texts:
            raise InvalidRequest("the form needs a text part 'id'", param="id")
        made = Upload(
            references.new_name(services, texts["id"]),
            found.file,
            found.fields.get("config"),
            _template(texts.get("template")),
            _metadata(texts.get("metadata")),
            _lifetime(texts.get("ttl_seconds")),
            if_match,
        )
        return (await to_thread.run_sync(_publish, services, caller, key, made)).response()


@router.put("/{name}/content")
async def put(request: Request, name: str, services: Serving, caller: Calling) -> Response:
    """Takes a file as the whole body; `metadata.KEY=VALUE` and `ttl_seconds` are parameters."""
    async with receiving(services) as path:
        key, if_match = repeats.key_of(request.headers), conditions.wanted(request.headers)
        references.new_name(services, name)
        metadata = check_metadata(queries.metadata(request, ("ttl_seconds",)))
        lifetime = _lifetime(request.query_params.get("ttl_seconds"))
        file = await receive(request.stream(), path)
        conditions.check_digest(request.headers, file.digest, file.digest)
        made = Upload(name, file, None, None, metadata, lifetime, if_match)
        return (await to_thread.run_sync(_publish, services, caller, key, made)).response()


@asynccontextmanager
async def receiving(services: Services) -> AsyncIterator[Path]:
    """Where the file may lie meanwhile. What is refused is counted."""
    spool = services.store.prefixes.spool()
    try:
        path = await to_thread.run_sync(spool.__enter__)
        try:
            yield path
        finally:
            await to_thread.run_sync(spool.__exit__, None, None, None)
    except AntefixError as error:
        services.metrics.upload_rejected.labels(error.code).inc()
        raise


def _publish(services: Services, caller: Caller, key: str | None, made: Upload) -> Reply:
    """Checks the file against the model and only then saves it."""
    return repeats.answer(services, caller, key, made.asked(), lambda keep: _save(services, caller, made, keep))


def _save(services: Services, caller: Caller, made: Upload, keep: Keep) -> Reply:
    manifest, tensors = _decode(services, made)
    frozen = services.frozen
    frozen.check_fits(manifest)
    served_tensors(tensors, frozen.dtype)  # for what it refuses

    def also(transaction: Transaction, version: PrefixVersion) -> None:
        keep(transaction, _reply(version))

    with references.changing(services, caller, made.name):
        version = services.store.prefixes.save(
            caller.tenant,
            made.name,
            manifest,
            tensors,
            metadata=made.metadata,
            lifetime=made.lifetime,
            if_match=made.if_match,
            by=caller.by,
            also=also,
        )
    return _reply(version)


def _reply(version: PrefixVersion) -> Reply:
    return Reply(201, views.published(version), conditions.etag(version))


def _decode(services: Services, made: Upload) -> tuple[PrefixManifest, PrefixTensors]:
    path = made.file.path
    if made.config is not None or peft.TENSOR in read_header(path).shapes:
        manifest, tensors = peft.read(made.config, path, services.frozen.geometry)
        return dataclasses.replace(manifest, template=made.template), tensors
    if made.template is not None:
        raise InvalidRequest("a native file carries its own template; this part goes with PEFT files", param="template")
    return codec.decode(path)


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise InvalidRequest("the form's text parts must be UTF-8", param=name) from None


def _template(text: str | None) -> str | None:
    return None if text is None else check_template(text, param="template")


def _metadata(text: str | None) -> dict[str, str]:
    if text is None:
        return {}
    try:
        return check_metadata(strict_json(text, "metadata", param="metadata"))
    except InvalidPrefix as error:
        raise InvalidRequest(error.message, param="metadata") from None


def _lifetime(text: str | None) -> float | None:
    if text is None:
        return None
    if not SECONDS.fullmatch(text):
        raise InvalidRequest(f"ttl_seconds must be a number of seconds, got {text[:40]!r}", param="ttl_seconds")
    return check_lifetime(float(text))
