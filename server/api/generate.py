"""POST /generate: text from the frozen model, after a prefix or none."""

from __future__ import annotations

import dataclasses
import uuid
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog
from anyio import to_thread
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from prefix_store.errors import AntefixError, InvalidRequest
from prefix_store.model.frozen import FrozenModel
from server.api import errors, logprobs, prompts, references, schemas, sse
from server.api.auth import Caller, Calling
from server.api.calls import Call, Choice, Delta
from server.api.prompts import Prompt
from server.api.references import ServedPrefix
from server.api.schemas import GenerateBody
from server.api.services import Services, Serving
from server.scheduler.messages import FinishReason, GenerationRequest
from server.scheduler.sampling_params import SamplingParams

DEFAULT_MAX_TOKENS = SamplingParams.max_tokens
router = APIRouter()
_log = structlog.get_logger("antefix.generate")


@dataclass(frozen=True)
class Generation:
    """A call on its way, and what its reply is made of."""

    id: str
    body: GenerateBody
    prefix: ServedPrefix | None
    prompt: Prompt
    call: Call
    services: Services
    begun: float
    tenant: str


@router.post("/generate")
async def generate(request: Request, services: Serving, caller: Calling) -> Response:
    """Answers with the whole text, or with a stream of its pieces."""
    begun = services.clock()
    body = await schemas.read(request, GenerateBody)
    generation = await _begin(body, services, caller, begun)
    if body.stream:
        return sse.EventStream(_events(generation), on_end=partial(_end, generation))
    try:
        await sse.unless_gone(request.receive, generation.call.finish())
    finally:
        await _end(generation)
    return JSONResponse(_reply(generation))


async def _begin(body: GenerateBody, services: Services, caller: Caller, begun: float) -> Generation:
    """Everything that can be refused is refused here, before the first byte of a reply."""
    prefix = await _prefix(body, services, caller)
    prompt = await _prompt(body, services, prefix)
    request = GenerationRequest(
        id=f"gen-{uuid.uuid4().hex}",
        tenant=caller.tenant,
        prompt_ids=prompt.ids,
        params=_sampling(body, services.frozen, len(prompt.ids) + _virtual_tokens(prefix)),
        prefix=prefix.payload if prefix else None,
        deadline=begun + body.timeout_s if body.timeout_s is not None else None,
    )
    rows = [_row(request, index) for index in range(body.n)]
    call = Call(services.loop, rows, services.frozen.tokenizer, services.clock)
    await services.rates.start(caller.tenant, body.n, len(prompt.ids))
    try:
        call.submit()
    except BaseException:
        services.rates.end(caller.tenant, body.n)
        raise
    return Generation(request.id, body, prefix, prompt, call, services, begun, caller.tenant)


async def _prefix(body: GenerateBody, services: Services, caller: Caller) -> ServedPrefix | None:
    if body.prefix_id is not None:
        with services.metrics.prefix_load.time():
            return await to_thread.run_sync(references.load, services, body.prefix_id, caller)
    if services.require_prefix:
        raise InvalidRequest("prefix_id is required: this server does not serve the bare model", param="prefix_id")
    return None


async def _prompt(body: GenerateBody, services: Services, prefix: ServedPrefix | None) -> Prompt:
    """A prefix's template goes around texts; ids are taken as they are."""
    if isinstance(body.prompt, str):
        return await prompts.from_text(body.prompt, prefix.template if prefix else None, services)
    return prompts.from_ids(body.prompt, services)


def _sampling(body: GenerateBody, frozen: FrozenModel, taken: int) -> SamplingParams:
    """An absent max_tokens takes what room there is, and at least one, so that too long a prompt is still refused."""
    default = max(1, min(DEFAULT_MAX_TOKENS, frozen.context_length - taken))
    return SamplingParams(
        max_tokens=default if body.max_tokens is None else body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=_logit_bias(body, frozen),
        seed=body.seed,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop),
        stop_token_ids=frozenset(body.stop_token_ids),
        min_tokens=body.min_tokens,
        ignore_eos=body.ignore_eos,
        logprobs=body.logprobs,
        echo=body.echo,
    )


def _logit_bias(body: GenerateBody, frozen: FrozenModel) -> tuple[tuple[int, float], ...]:
    last = frozen.vocabulary_size - 1
    if max(body.logit_bias, default=0) > last:
        odd = max(body.logit_bias)
        raise InvalidRequest(f"logit_bias: token ids must be from 0 to {last}, got {odd}", param="logit_bias")
    return tuple(body.logit_bias.items())


def _row(request: GenerationRequest, index: int) -> GenerationRequest:
    """Choice `index` of a call: an id of its own, and `seed + index` wrapped into 64 bits."""
    params = request.params
    if params.seed is not None:
        params = dataclasses.replace(params, seed=(params.seed + index + 2**63) % 2**64 - 2**63)
    return dataclasses.replace(request, id=f"{request.id}-{index}", params=params)


def _virtual_tokens(prefix: ServedPrefix | None) -> int:
    return prefix.payload.virtual_tokens if prefix else 0


async def _events(generation: Generation) -> AsyncGenerator[bytes, None]:
    """The stream's events. A failure from here on can only be told inside of it."""
    try:
        if generation.body.echo:
            for choice in generation.call.choices:
                yield sse.event(_piece(generation, Delta(choice.index, generation.prompt.text)))
        async for delta in generation.call.deltas():
            if delta.text or delta.logprobs or delta.finish_reason:
                yield sse.event(_piece(generation, delta))
    except AntefixError as error:
        yield sse.event(errors.body(error))
    except Exception:
        _log.exception("unhandled")
        yield sse.event(errors.body(errors.unforeseen()))
    yield sse.DONE


def _piece(generation: Generation, delta: Delta) -> dict[str, Any]:
    piece = {"id": generation.id, "index": delta.index, "text": delta.text, "finish_reason": delta.finish_reason}
    if delta.logprobs:
        piece["logprobs"] = logprobs.render(delta.logprobs, generation.services.frozen.tokenizer)
    return piece | _closing(generation) if generation.call.has_ended else piece


def _reply(generation: Generation) -> dict[str, Any]:
    choices = [_choice(generation, choice) for choice in generation.call.choices]
    first = {key: value for key, value in choices[0].items() if key != "index"}
    several = {"choices": choices} if len(choices) > 1 else {}
    return {"id": generation.id, **first, **several, **_closing(generation)}


def _choice(generation: Generation, choice: Choice) -> dict[str, Any]:
    echo = generation.prompt.text if generation.body.echo else ""
    shown = {"index": choice.index, "text": echo + choice.text, "finish_reason": choice.finish_reason}
    if generation.body.logprobs is not None:
        shown["logprobs"] = logprobs.render(choice.logprobs, generation.services.frozen.tokenizer)
    return shown


def _closing(generation: Generation) -> dict[str, Any]:
    """What a reply ends with."""
    prefix = generation.prefix
    return {
        "prefix": prefix.to_json() if prefix else None,
        "usage": {
            "prompt_tokens": len(generation.prompt.ids),
            "completion_tokens": generation.call.tokens,
            "virtual_tokens": _virtual_tokens(prefix),
        },
        "timings": _timings(generation),
    }


def _timings(generation: Generation) -> dict[str, float | None]:
    first, last = generation.call.first_token_at, generation.call.ended_at
    seconds = {"time_to_first_token_ms": first, "total_ms": last}
    return {name: None if at is None else round(1000 * (at - generation.begun), 3) for name, at in seconds.items()}


async def _end(generation: Generation) -> None:
    """Ends what still runs, and records what became of the call."""
    call, rates = generation.call, generation.services.rates
    call.abort()
    rates.end(generation.tenant, generation.body.n)
    _record(generation)
    await rates.count_generated(generation.tenant, call.tokens)


def _record(generation: Generation) -> None:
    call, metrics = generation.call, generation.services.metrics
    reasons = Counter(str(choice.finish_reason or FinishReason.ABORT) for choice in call.choices)
    for reason, count in reasons.items():
        metrics.finished.labels(reason).inc(count)
    if call.first_token_at is not None:
        metrics.first_token.observe(call.first_token_at - generation.begun)
    if call.ended_at is not None:
        metrics.latency.observe(call.ended_at - generation.begun)
    structlog.contextvars.bind_contextvars(
        call=generation.id,
        prefix=generation.prefix and str(generation.prefix.version.ref),
        prompt_tokens=len(generation.prompt.ids),
        completion_tokens=call.tokens,
        finish_reasons=dict(reasons),
        timings=_timings(generation),
    )
