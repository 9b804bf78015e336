"""GET /openapi.json: every route, what it takes, and every status that it can answer with."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

from prefix_store.errors import AntefixError, JobNotFound, ModelNotFound, NoSuchFile, PrefixNotFound
from server.api import errors, shapes
from server.api.auth import OPEN
from server.api.documented import KEYED, ROWS, WITH_BODY, Row

ABOUT = "HEAD is answered wherever GET is, as GET is but without the body."
REFERENCE = "#/components/schemas/{model}"
JSON = "application/json"
DESCRIPTIONS = {
    **{200: "Done", 201: "Made", 202: "Accepted", 304: "The caller has it already, by If-None-Match"},
    **{400: "The request cannot be served as it stands", 401: "No API key, or not a valid one"},
    **{403: "The key lacks the scope, or a quota is used up", 404: "Unknown, or another tenant's"},
    **{408: "The body stopped on its way", 409: "Not in this state", 412: "Not what If-Match says any more"},
    **{413: "The body is larger than this route takes"},
    **{422: "An Idempotency-Key of another request, or a prefix whose logits overflow"},
    **{429: "Too much in this minute, or at once; see Retry-After", 500: "The server failed"},
    503: "The store is away, the server stops, or has no memory now; see Retry-After",
}
UPLOAD = {
    "required": ["id", "file"],
    "type": "object",
    "properties": {
        **{name: {"type": "string"} for name in ("id", "config", "template", "metadata", "ttl_seconds")},
        "file": {"type": "string", "contentMediaType": "application/octet-stream"},
    },
}
TRAINING = {
    "required": ["purpose", "file"],
    "type": "object",
    "properties": {
        "purpose": {"const": "fine-tune"},
        "file": {"type": "string", "contentMediaType": "application/octet-stream"},
    },
}
FILES = {
    ("POST", "/v1/prefixes"): ("multipart/form-data", UPLOAD),
    ("PUT", "/v1/prefixes/{name}/content"): ("application/octet-stream", {"type": "string", "format": "binary"}),
    ("POST", "/v1/files"): ("multipart/form-data", TRAINING),
}
SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
# The first error of each status stands for all: its code and its type.
REFUSALS = {status: (kind.code, type_) for kind, (status, type_) in reversed(errors.TABLE.items())}
# What is missing where, by how the route begins.
MISSING: dict[str, type[AntefixError]] = {
    "/v1/prefixes": PrefixNotFound,
    "/generate": PrefixNotFound,
    "/v1/jobs": JobNotFound,
    "/v1/fine_tuning": JobNotFound,
    "/v1/files": NoSuchFile,
}
EVERYWHERE = {"x-request-id": {"description": "The caller's own, or one for the log", "schema": {"type": "string"}}}
WAIT = {"retry-after": {"description": "In seconds", "schema": {"type": "string"}}}
RATES = {
    f"x-ratelimit-{part}-{what}": {"description": "Where the tenant has such a quota", "schema": {"type": "string"}}
    for part in ("limit", "remaining", "reset")
    for what in ("requests", "tokens")
}
router = APIRouter()


@router.get("/openapi.json")
async def show(request: Request) -> dict[str, Any]:
    """This document."""
    app: FastAPI = request.app
    if app.openapi_schema is None:
        app.openapi_schema = document(app)
    return app.openapi_schema


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI 3.1 document of an app. A route without a row in `ROWS` is told of without its reply's shape."""
    made = get_openapi(title=app.title, version=app.version, description=ABOUT, routes=app.routes)
    components: dict[str, Any] = {}
    for path, methods in made["paths"].items():
        for method, operation in methods.items():
            row = ROWS.get((method.upper(), path), Row(shapes.Object, {}))
            _describe(operation, (method.upper(), path), row, components)
    _shape(shapes.Error, components)
    return {**made, "components": {"schemas": components, "securitySchemes": SCHEMES}}


def _describe(operation: dict[str, Any], route: tuple[str, str], row: Row, components: dict[str, Any]) -> None:
    operation["responses"] = {str(row.status): _reply(row, components)}
    for status in _others(route, row):
        operation["responses"][str(status)] = _refusal(status, route[1])
    if route == ("GET", "/readyz"):
        example = {"status": "stopping", "model": True, "store": True}
        content = {JSON: {"schema": _shape(shapes.Readiness, components), "example": example}}
        operation["responses"]["503"] = {"description": "No requests should be sent here", "content": content}
    for status, reply in operation["responses"].items():
        waits = WAIT if status in ("429", "503") else {}
        rated = RATES if row.streams and status in ("200", "429") else {}
        reply["headers"] = EVERYWHERE | waits | rated
    if route[1] not in OPEN:
        # {}: on loopback, before the first key is made
        operation["security"] = [{name: []} for name in SCHEMES] + [{}]
    if row.body is not None:
        taken = {"schema": _component(row.body, components), "example": row.body_example}
        operation["requestBody"] = {"required": True, "content": {JSON: taken}}
    elif route in FILES:
        media, file = FILES[route]
        operation["requestBody"] = {"required": True, "content": {media: {"schema": file}}}


def _others(route: tuple[str, str], row: Row) -> list[int]:
    keyed = KEYED if route[1] not in OPEN else ()
    return sorted({*keyed, *row.others, *(WITH_BODY if row.body is not None else ())})


def _reply(row: Row, components: dict[str, Any]) -> dict[str, Any]:
    if isinstance(row.reply, str):
        text = {"schema": {"type": "string"}, "example": row.reply_example}
        content: dict[str, Any] = dict.fromkeys(row.reply.split(", "), text)
    else:
        content = {JSON: {"schema": _shape(row.reply, components), "example": row.reply_example}}
    if row.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}, "example": "data: {…}\n\ndata: [DONE]\n\n"}
    return {"description": DESCRIPTIONS[row.status], "content": content}


def _refusal(status: int, path: str) -> dict[str, Any]:
    if status == 304:
        return {"description": DESCRIPTIONS[304]}
    code, kind = REFUSALS[status]
    if status == 404:
        code = next((kind.code for begin, kind in MISSING.items() if path.startswith(begin)), ModelNotFound.code)
    example = {"error": {"message": DESCRIPTIONS[status], "type": kind, "param": None, "code": code}}
    schema = {"$ref": REFERENCE.format(model="Error")}
    return {"description": DESCRIPTIONS[status], "content": {JSON: {"schema": schema, "example": example}}}


def _shape(shape: Any, components: dict[str, Any]) -> dict[str, Any]:
    """A reply's, which has its fields and no others."""
    return _component(shape, components, {"additionalProperties": False})


def _component(kind: Any, components: dict[str, Any], more: dict[str, Any] | None = None) -> dict[str, Any]:
    """A reference to a schema, which is put among the components with all that it is made of."""
    made = TypeAdapter(kind).json_schema(ref_template=REFERENCE)
    parts = made.pop("$defs", {})
    if "properties" not in made:
        return made
    for name, part in {**parts, made["title"]: made}.items():
        components[name] = (more or {}) | part if "properties" in part else part
    return {"$ref": REFERENCE.format(model=made["title"])}
