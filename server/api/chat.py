"""POST /v1/chat/completions: the frozen model's answer to messages, in OpenAI's shape.

The messages are written by the chat template. A prefix's own template is for plain prompts, and is not applied here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from server.api import generation, logprobs, model_names, prompts, rendering, schemas
from server.api.auth import Caller, Calling
from server.api.calls import Choice, Delta
from server.api.generation import Generation
from server.api.openai_schemas import ChatBody
from server.api.replies import Choices, Reply, ending
from server.api.services import Services, Serving

router = APIRouter(prefix="/v1/chat/completions")


@router.post("")
async def answer(request: Request, services: Serving, caller: Calling) -> Response:
    """Answers with a message for every choice, or with a stream of their pieces."""
    begun = services.clock()
    body = await schemas.read(request, ChatBody)
    with body.as_written():
        started = await _begin(body, services, caller, begun)
    if body.stream:
        return generation.stream(started, Reply.to(body, started, "chat.completion.chunk").chunks(_pieces(started)))
    await generation.finish(started, request)
    reply = Reply.to(body, started, "chat.completion")
    choices = (_choice(started, choice, body) for choice in started.call.choices)
    if not body.logprobs:
        return JSONResponse(reply.whole(list(choices)))
    return await rendering.response({**reply.head, "usage": reply.usage()}, choices, services)


async def _begin(body: ChatBody, services: Services, caller: Caller, begun: float) -> Generation:
    """Everything that can be refused is refused here, before the first byte of a reply."""
    prefix = await model_names.load(body.model, services, caller)
    prompt = await prompts.from_chat([message.to_json() for message in body.messages], services)
    context = services.frozen.context_length
    taken = generation.taken(prompt, prefix, services.frozen)
    params = generation.sampling(body, services.frozen, taken, otherwise=context, logprobs=body.scores)
    return await generation.begin("chatcmpl", [(prompt, params)], body, prefix, services, caller, begun)


def _choice(started: Generation, choice: Choice, body: ChatBody) -> dict[str, Any]:
    return {
        "index": choice.index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": logprobs.of_chat(choice.logprobs, started.services.frozen.tokenizer) if body.logprobs else None,
        **ending(choice.finish_reason),
    }


async def _pieces(started: Generation) -> Choices:
    """A choice's first piece has its role and no text, and comes with the first token, not before."""
    silent = {choice.index for choice in started.call.choices}
    async for delta in started.call.deltas():
        if delta.index in silent:
            silent.remove(delta.index)
            yield _piece(delta.index, {"role": "assistant", "content": "", "refusal": None})
        if delta.text or delta.logprobs or delta.finish_reason:
            yield await rendering.of_tokens(len(delta.logprobs), partial(_of_delta, started, delta), started.services)


def _of_delta(started: Generation, delta: Delta) -> dict[str, Any]:
    scores = logprobs.of_chat(delta.logprobs, started.services.frozen.tokenizer) if delta.logprobs else None
    content = {"content": delta.text} if delta.text or scores else {}
    return _piece(delta.index, content, scores, delta.finish_reason)


def _piece(
    index: int, delta: dict[str, Any], scores: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": scores, **ending(finish_reason)}
