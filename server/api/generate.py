"""POST /generate: text from the frozen model, after a prefix or none."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from prefix_store.errors import InvalidRequest
from server.api import generation, logprobs, prompts, rendering, schemas
from server.api.auth import Caller, Calling
from server.api.calls import Choice, Delta
from server.api.generation import Generation
from server.api.prompts import Prompt
from server.api.references import ServedPrefix
from server.api.schemas import GenerateBody
from server.api.services import Services, Serving
from server.scheduler.sampling_params import SamplingParams

DEFAULT_MAX_TOKENS = SamplingParams.max_tokens
router = APIRouter()


@router.post("/generate")
async def generate(request: Request, services: Serving, caller: Calling) -> Response:
    """Answers with the whole text, or with a stream of its pieces."""
    begun = services.clock()
    body = await schemas.read(request, GenerateBody)
    started = await _begin(body, services, caller, begun)
    if body.stream:
        return generation.stream(started, _pieces(started))
    await generation.finish(started, request)
    tokens = sum(len(choice.logprobs) for choice in started.call.choices)
    return await rendering.of_tokens(tokens, partial(_reply, started, body), services)


async def _begin(body: GenerateBody, services: Services, caller: Caller, begun: float) -> Generation:
    """Everything that can be refused is refused here, before the first byte of a reply."""
    prefix = await _prefix(body, services, caller)
    prompt = await _prompt(body, services, prefix)
    params = generation.sampling(
        body,
        services.frozen,
        generation.taken(prompt, prefix, services.frozen),
        otherwise=DEFAULT_MAX_TOKENS,
        logprobs=body.logprobs,
        echo=body.echo,
    )
    return await generation.begin("gen", [(prompt, params)], body, prefix, services, caller, begun)


async def _prefix(body: GenerateBody, services: Services, caller: Caller) -> ServedPrefix | None:
    if body.prefix_id is not None:
        return await generation.load_prefix(body.prefix_id, services, caller)
    if services.require_prefix:
        raise InvalidRequest("prefix_id is required: this server does not serve the bare model", param="prefix_id")
    return None


async def _prompt(body: GenerateBody, services: Services, prefix: ServedPrefix | None) -> Prompt:
    """A prefix's template goes around texts; ids are taken as they are."""
    if isinstance(body.prompt, str):
        return await prompts.from_text(body.prompt, prefix.template if prefix else None, services)
    return prompts.from_ids(body.prompt, services)


async def _pieces(started: Generation) -> AsyncGenerator[dict[str, Any], None]:
    async for delta in started.call.deltas():
        if delta.text or delta.logprobs or delta.finish_reason:
            yield await rendering.of_tokens(len(delta.logprobs), partial(_piece, started, delta), started.services)


def _piece(started: Generation, delta: Delta) -> dict[str, Any]:
    piece = {"id": started.id, "index": delta.index, "text": delta.text, "finish_reason": delta.finish_reason}
    if delta.logprobs:
        piece["logprobs"] = logprobs.render(delta.logprobs, started.services.frozen.tokenizer)
    return piece | _closing(started) if started.call.has_ended else piece


def _reply(started: Generation, body: GenerateBody) -> Response:
    choices = started.call.choices
    first = {key: value for key, value in _choice(started, body, choices[0]).items() if key != "index"}
    reply = {"id": started.id, **first, **_closing(started)}
    if len(choices) == 1:
        return JSONResponse(reply)
    several = rendering.written(reply, (_choice(started, body, choice) for choice in choices))
    return Response(several, media_type="application/json")


def _choice(started: Generation, body: GenerateBody, choice: Choice) -> dict[str, Any]:
    shown = {"index": choice.index, "text": choice.text, "finish_reason": choice.finish_reason}
    if body.logprobs is not None:
        shown["logprobs"] = logprobs.render(choice.logprobs, started.services.frozen.tokenizer)
    return shown


def _closing(started: Generation) -> dict[str, Any]:
    """What a reply ends with."""
    return {
        "prefix": started.prefix.to_json() if started.prefix else None,
        "usage": {
            "prompt_tokens": started.prompt_tokens,
            "completion_tokens": started.call.tokens,
            "virtual_tokens": started.virtual_tokens,
        },
        "timings": started.timings,
    }
