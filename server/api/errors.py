"""Every failure as `{"error": {"message", "type", "param", "code"}}`, by one table."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.routing import Match

from prefix_store import errors
from prefix_store.errors import AntefixError
from prefix_store.examples import kind

INVALID, AUTHENTICATION, PERMISSION = "invalid_request_error", "authentication_error", "permission_error"
RATE_LIMIT, SERVER = "rate_limit_error", "server_error"

# status and type by class; a class that is not here is answered as its base
TABLE: dict[type[AntefixError], tuple[int, str]] = {
    AntefixError: (500, SERVER),
    errors.InvalidRequest: (400, INVALID),
    errors.PayloadTooLarge: (413, INVALID),
    errors.NotFound: (404, INVALID),
    errors.RequestTimeout: (408, INVALID),
    errors.Unauthorized: (401, AUTHENTICATION),
    errors.Forbidden: (403, PERMISSION),
    errors.QuotaExceeded: (403, PERMISSION),
    errors.Conflict: (409, INVALID),
    errors.PreconditionFailed: (412, INVALID),
    errors.KeyReused: (422, INVALID),
    errors.RateLimited: (429, RATE_LIMIT),
    errors.Overloaded: (429, RATE_LIMIT),
    errors.StoreUnavailable: (503, SERVER),
    errors.Loading: (503, SERVER),
    errors.GenerationFailed: (500, SERVER),
    errors.PrefixNumerics: (422, INVALID),
    errors.OutOfMemory: (503, SERVER),
    errors.ShuttingDown: (503, SERVER),
}
HEADERS = {
    401: {"www-authenticate": "Bearer"},
    408: {"connection": "close"},  # what still comes of the body is no next request
    409: {"x-should-retry": "false"},  # clients repeat a 409 otherwise, and this one stays
    503: {"retry-after": "1"},
}
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
STATUS_CODES = {404: "route_not_found", 405: "method_not_allowed"}
ARMS = ("list[", "dict[", "literal[")  # how pydantic names the arms of a union, beside plain types
LONGEST, LONGEST_PATH = 1000, 60


def body(error: AntefixError) -> dict[str, Any]:
    """The error's JSON, also for a stream that has begun."""
    return _body(error.message, _row(error)[1], error.param, error.code)


def response(error: AntefixError) -> JSONResponse:
    """The error's whole reply."""
    status = _row(error)[0]
    wait = getattr(error, "retry_after", None)
    headers = HEADERS.get(status) if wait is None else {"retry-after": str(wait)}
    return JSONResponse(body(error), status, headers=headers)


def unforeseen() -> AntefixError:
    """What a caller is told about a failure that nobody foresaw; the log has the rest."""
    return AntefixError("the server failed on this request")


def install(app: FastAPI) -> None:
    """Registers the handlers. What nobody foresaw is answered by `Exchange`, outside of them."""
    app.add_exception_handler(AntefixError, _on_antefix_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)


def invalid(details: list[ErrorDetails] | list[Any]) -> errors.InvalidRequest:
    """The first field that pydantic refused, with everything it said about it and what kind of thing came.

    Never with the value, which may be anybody's text.
    """
    path = _path(details[0]["loc"])
    about = [detail for detail in details if _path(detail["loc"])[: len(path)] == path]
    said = dict.fromkeys(detail["msg"] for detail in about)
    where = f"{_written(path)}: " if path else ""
    # of a list that one arm of a union takes, the other arms say things about what is in it
    is_kind = all(detail["type"].endswith("_type") and _path(detail["loc"]) == path for detail in about)
    came = f", got {kind(about[0]['input'])}" if is_kind else ""
    field = list(takewhile(lambda part: isinstance(part, str), path))
    return errors.InvalidRequest(where + "; or ".join(said) + came, param=_written(field) or None)


def _path(place: Sequence[str | int]) -> list[str | int]:
    """Names and numbers that a caller has written; the arms of a union, which pydantic adds, mean nothing to one."""
    return [part for part in place if part not in ("str", "bool") and not str(part).startswith(ARMS)]


def _written(path: Sequence[str | int]) -> str:
    """`examples.3.prompt`."""
    return ".".join(str(part)[:80] for part in path[:4])


def _row(error: AntefixError) -> tuple[int, str]:
    return next(TABLE[kind] for kind in type(error).__mro__ if kind in TABLE)


def _body(message: str, kind: str, param: str | None, code: str) -> dict[str, Any]:
    said = message if len(message) <= LONGEST else f"{message[: LONGEST - 1]}…"
    return {"error": {"message": _sound(said), "type": kind, "param": _sound(param), "code": code}}


def _sound(text: Any) -> Any:
    """Half a surrogate pair cannot be sent, and somebody may have sent us one."""
    return text.encode("utf-8", "replace").decode() if isinstance(text, str) else text


async def _on_antefix_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, AntefixError)
    request.app.state.services.metrics.refused.labels(error.code).inc()
    return response(error)


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    """Query and path parameters; bodies are read by `schemas.read`."""
    assert isinstance(error, RequestValidationError)
    details = [{**detail, "loc": detail["loc"][1:]} for detail in error.errors()]
    return await _on_antefix_error(request, invalid(details))


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Starlette's own: no such route, no such method, a multipart body that cannot be read."""
    assert isinstance(error, HTTPException)
    status, headers, message = error.status_code, error.headers, str(error.detail)
    asked = f"{request.method} {request.url.path[:LONGEST_PATH]}"
    if status == 404:
        message = f"there is no route {asked}; /openapi.json lists those that there are"
    elif status == 405:
        headers = {"allow": ", ".join(_methods(request))}
        message = f"there is no {asked}; allowed: {headers['allow']}"
    code = STATUS_CODES.get(status, "invalid_request")
    request.app.state.services.metrics.refused.labels(code).inc()
    return JSONResponse(_body(message, INVALID if status < 500 else SERVER, None, code), status, headers=headers)


def _methods(request: Request) -> list[str]:
    """What may be done at an address: by all of its routes, while Starlette names the first one's methods."""

    def is_there(method: str) -> bool:
        scope = {**request.scope, "method": method, "path_params": {}}
        return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)

    found = [method for method in METHODS if is_there(method)]
    return ["HEAD", *found] if "GET" in found else found
