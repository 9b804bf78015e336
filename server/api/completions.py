"""POST /v1/completions: the frozen model after prompts, in OpenAI's shape. `model` names the prefix, or the base."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from prefix_store.errors import InvalidRequest
from server.api import generation, logprobs, model_names, prompts, rendering, schemas
from server.api.auth import Caller, Calling
from server.api.calls import Choice
from server.api.generation import Generation
from server.api.logprobs import Offsets
from server.api.openai_schemas import CompletionBody
from server.api.replies import Choices, Reply, ending
from server.api.services import Services, Serving
from server.scheduler.messages import TokenLogprob

# OpenAI's own, which clients of this route know
DEFAULT_MAX_TOKENS = 16
MOST_CHOICES = 512
router = APIRouter(prefix="/v1/completions")


@router.post("")
async def complete(request: Request, services: Serving, caller: Calling) -> Response:
    """Answers with the whole text of every choice, or with a stream of their pieces."""
    begun = services.clock()
    body = await schemas.read(request, CompletionBody)
    with body.as_written():
        started = await _begin(body, services, caller, begun)
    reply = Reply.to(body, started, "text_completion")
    if body.stream:
        return generation.stream(started, reply.chunks(_pieces(started, body)))
    await generation.finish(started, request)
    if body.logprobs is None:
        return JSONResponse(reply.whole([_choice(started, body, choice) for choice in started.call.choices]))
    choices = (_choice(started, body, choice) for choice in started.call.choices)
    return await rendering.response({**reply.head, "usage": reply.usage()}, choices, services)


async def _begin(body: CompletionBody, services: Services, caller: Caller, begun: float) -> Generation:
    """Everything that can be refused is refused here, before the first byte of a reply."""
    prefix = await model_names.load(body.model, services, caller)
    asked = body.prompts
    if len(asked) * max(body.n, body.num_beams) > MOST_CHOICES:
        raise InvalidRequest(f"prompts times n, or num_beams, must be at most {MOST_CHOICES}", param="prompt")
    found = await prompts.from_each(asked, prefix.template if prefix else None, services)
    params = [
        generation.sampling(
            body,
            services.frozen,
            generation.taken(prompt, prefix, services.frozen),
            otherwise=DEFAULT_MAX_TOKENS,
            logprobs=body.logprobs,
            echo=body.echo,
        )
        for prompt in found
    ]
    return await generation.begin("cmpl", list(zip(found, params, strict=True)), body, prefix, services, caller, begun)


def _choice(started: Generation, body: CompletionBody, choice: Choice) -> dict[str, Any]:
    scores = None
    if body.logprobs is not None:
        scores = _scores([*choice.logprobs, *_end(choice, body)], started, _offsets(started, body, choice))
    return _shown(choice.index, choice.text, choice.finish_reason, scores)


async def _pieces(started: Generation, body: CompletionBody) -> Choices:
    choices = started.call.choices
    offsets = [_offsets(started, body, choice) for choice in choices]
    async for delta in started.call.deltas():
        ended = _end(choices[delta.index], body) if delta.finish_reason else ()
        scores = [*delta.logprobs, *ended]
        if delta.text or scores or delta.finish_reason:
            scored = partial(_scores, scores, started, offsets[delta.index])
            found = await rendering.of_tokens(len(scores), scored, started.services) if scores else None
            yield _shown(delta.index, delta.text, delta.finish_reason, found)


def _end(choice: Choice, body: CompletionBody) -> tuple[TokenLogprob, ...]:
    """After an echo, the token that ended the text.

    Whoever scores a prompt asks for one token more, and takes the last one off again: it must be there.
    """
    return (choice.end_logprob,) if body.echo and choice.end_logprob is not None else ()


def _offsets(started: Generation, body: CompletionBody, choice: Choice) -> Offsets:
    """For the text that the choice shows, which with an echo begins with the prompt."""
    before = () if body.echo else started.before(choice.index)
    return Offsets(started.services.frozen.tokenizer, before)


def _scores(entries: Sequence[TokenLogprob], started: Generation, offsets: Offsets) -> dict[str, Any]:
    shown = logprobs.render(entries, started.services.frozen.tokenizer)
    return {**shown, "text_offset": offsets.of(entries)}


def _shown(index: int, text: str, finish_reason: str | None, scores: dict[str, Any] | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": scores, **ending(finish_reason)}
