"""Log-probabilities in replies: perhaps millions of numbers, made and written without holding up other calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from anyio import to_thread
from starlette.responses import Response

from server.api.services import Services

# Tokens whose log-probabilities are rendered sooner than a thread is asked.
FEW = 8
T = TypeVar("T")


async def of_tokens(count: int, work: Callable[[], T], services: Services) -> T:
    """What `work` makes of so many tokens' log-probabilities: of few at once, of many in a thread."""
    if count <= FEW:
        return work()
    return await to_thread.run_sync(work, limiter=services.tokenizing)


async def response(reply: Mapping[str, Any], choices: Iterable[dict[str, Any]], services: Services) -> Response:
    """A whole reply with its choices, which are made in a thread as they are asked for."""
    content = await to_thread.run_sync(written, reply, choices, limiter=services.tokenizing)
    return Response(content, media_type="application/json")


def written(reply: Mapping[str, Any], choices: Iterable[dict[str, Any]]) -> bytes:
    """The JSON of both, choice by choice: one dump of all would not let anybody in until it is done."""
    pieces = [_json(choice) for choice in choices]
    return _json(reply).removesuffix(b"}") + b',"choices":[' + b",".join(pieces) + b"]}"


def _json(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
