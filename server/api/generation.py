"""A call on its way, whatever route it came by: begun from checked fields, ended once, told of in the log."""

from __future__ import annotations

import dataclasses
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog
from fastapi import Request

from prefix_store.errors import AntefixError, InvalidRequest
from prefix_store.model.frozen import FrozenModel
from server.api import errors, prompts, references, sse, structured
from server.api.auth import Caller
from server.api.calls import Call
from server.api.prompts import Prompt
from server.api.references import ServedPrefix
from server.api.schemas import ALL, SamplingFields
from server.api.services import Services
from server.metrics import GENERATION, PROMPT
from server.scheduler.messages import FinishReason, GenerationRequest
from server.scheduler.sampling_params import SamplingParams

_log = structlog.get_logger("antefix.generate")


@dataclass(frozen=True)
class Generation:
    """A call on its way, and what its reply is made of. Each prompt has `n` choices, which stand together."""

    id: str
    tenant: str
    prefix: ServedPrefix | None
    prompts: tuple[Prompt, ...]
    n: int
    call: Call
    services: Services
    begun: float

    def prompt_of(self, choice: int) -> Prompt:
        """The prompt that a choice answers."""
        return self.prompts[choice // self.n]

    def before(self, choice: int) -> tuple[int, ...]:
        """The tokens that a choice's own follow."""
        frozen = self.services.frozen
        return frozen.start_ids if frozen.is_encoder_decoder else self.prompt_of(choice).ids

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts, each counted once."""
        return sum(len(prompt.ids) for prompt in self.prompts)

    @property
    def virtual_tokens(self) -> int:
        """Those that stand before the prompts, counted as the prompts are."""
        return virtual_tokens(self.prefix) * len(self.prompts)

    @property
    def timings(self) -> dict[str, float | None]:
        """Milliseconds from the beginning."""
        seconds = {"time_to_first_token_ms": self.call.first_token_at, "total_ms": self.call.ended_at}
        return {name: None if at is None else round(1000 * (at - self.begun), 3) for name, at in seconds.items()}


async def load_prefix(reference: str, services: Services, caller: Caller) -> ServedPrefix:
    """The prefix behind a reference. Raises what `references.load` raises."""
    with services.metrics.prefix_load.time():
        return await references.load(services, reference, caller)


def virtual_tokens(prefix: ServedPrefix | None) -> int:
    """How many tokens stand before what the model reads."""
    return prefix.payload.virtual_tokens if prefix else 0


def taken(prompt: Prompt, prefix: ServedPrefix | None, frozen: FrozenModel) -> int:
    """How much of an answer's context is taken before its first token."""
    if not frozen.is_encoder_decoder:
        return len(prompt.ids) + virtual_tokens(prefix)
    in_source = prefix.payload.source_tokens if prefix else 0
    return len(frozen.start_ids) + virtual_tokens(prefix) - in_source


def sampling(
    fields: SamplingFields,
    frozen: FrozenModel,
    taken: int,
    *,
    otherwise: int,
    logprobs: int | None = None,
    echo: bool = False,
) -> SamplingParams:
    """How a prompt's answers are chosen, where `taken` tokens of the context are taken before the first.

    An absent max_tokens is `otherwise`, or what room there is, and at least one, so that too long a prompt is still
    refused. Raises InvalidRequest, also for an echo of what the answer does not follow.
    """
    _check_known("logit_bias", fields.logit_bias, frozen)
    _check_known("stop_token_ids", fields.stop_token_ids, frozen)
    if echo and frozen.is_encoder_decoder:
        raise InvalidRequest(
            "echo: an encoder-decoder model's answer does not follow its prompt, and the prompt has no scores",
            param="echo",
        )
    room = max(1, min(otherwise, frozen.context_length - taken))
    return SamplingParams(
        max_tokens=room if fields.max_tokens is None else fields.max_tokens,
        temperature=fields.temperature,
        top_p=fields.top_p,
        top_k=0 if fields.top_k == ALL else fields.top_k,
        min_p=fields.min_p,
        repetition_penalty=fields.repetition_penalty,
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        logit_bias=tuple(fields.logit_bias.items()),
        seed=fields.seed,
        stop=(fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop),
        stop_token_ids=frozenset(fields.stop_token_ids),
        min_tokens=fields.min_tokens,
        num_beams=fields.num_beams,
        length_penalty=fields.length_penalty,
        early_stopping=fields.early_stopping,
        ignore_eos=fields.ignore_eos,
        logprobs=logprobs,
        echo=echo,
    )


async def begin(
    kind: str,
    asked: Sequence[tuple[Prompt, SamplingParams]],
    fields: SamplingFields,
    prefix: ServedPrefix | None,
    services: Services,
    caller: Caller,
    begun: float,
) -> Generation:
    """Queues every choice of every prompt, or none. With beams a prompt's choices are one request.

    Raises RateLimited, what `structured.load` raises, and what the engine raises for a request that it cannot take.
    """
    _check_beams(fields)
    grammar = await structured.load(fields.response_format, fields.structured_outputs, services, caller)
    requests, each = (1, fields.n) if fields.num_beams > 1 else (fields.n, 1)
    name = f"{kind}-{uuid.uuid4().hex}"
    deadline = begun + fields.timeout_s if fields.timeout_s is not None else None
    rows = [
        GenerationRequest(
            id=f"{name}-{place * requests + index}",
            tenant=caller.tenant,
            params=_seeded(params, index),
            prefix=prefix.payload if prefix else None,
            deadline=deadline,
            grammar=grammar,
            **prompts.fields(prompt.ids, services.frozen),
        )
        for place, (prompt, params) in enumerate(asked)
        for index in range(requests)
    ]
    if len(rows) > services.loop.most_waiting:
        raise InvalidRequest(
            f"this asks for {len(rows)} answers, and no more than {services.loop.most_waiting} may wait here",
            param="n" if fields.n > 1 else "prompt",
        )
    echoes = [prompt.text if params.echo else "" for prompt, params in asked for _ in range(fields.n)]
    call = Call(services.loop, rows, services.frozen.tokenizer, services.clock, echoes, each)
    whole = tuple(prompt for prompt, _ in asked)
    param = "n" if fields.num_beams == 1 else "num_beams"
    await services.rates.start(caller.tenant, call.rows, sum(len(prompt.ids) for prompt in whole), param)
    try:
        call.submit()
    except BaseException:
        services.rates.end(caller.tenant, call.rows)
        raise
    generation = Generation(name, caller.tenant, prefix, whole, fields.n, call, services, begun)
    services.metrics.tenants.count(caller.tenant, PROMPT, generation.prompt_tokens)
    return generation


async def finish(generation: Generation, request: Request) -> None:
    """Waits for all choices, and ends the call. Raises GenerationFailed, and ClientDisconnect when nobody waits."""
    try:
        await sse.unless_gone(request.receive, generation.call.finish())
    finally:
        await end(generation)


def stream(generation: Generation, pieces: AsyncGenerator[dict[str, Any], None]) -> sse.EventStream:
    """The reply that sends the pieces as they come, and ends the call."""
    return sse.EventStream(_events(pieces), on_end=partial(end, generation))


async def end(generation: Generation) -> None:
    """Ends what still runs, and records what became of the call."""
    call, rates = generation.call, generation.services.rates
    call.abort()
    rates.end(generation.tenant, call.rows)
    _record(generation)
    await rates.count_generated(generation.tenant, call.tokens)


def _record(generation: Generation) -> None:
    call, metrics = generation.call, generation.services.metrics
    reasons = Counter(str(choice.finish_reason or FinishReason.ABORT) for choice in call.choices)
    for reason, count in reasons.items():
        metrics.finished.labels(reason).inc(count)
    metrics.tenants.count(generation.tenant, GENERATION, call.tokens)
    metrics.prompt_length.observe(generation.prompt_tokens)
    metrics.answer_length.observe(call.tokens)
    if call.first_token_at is not None:
        metrics.first_token.observe(call.first_token_at - generation.begun)
    if call.ended_at is not None:
        metrics.latency.observe(call.ended_at - generation.begun)
    longest = max(choice.tokens for choice in call.choices)
    if call.first_token_at is not None and call.ended_at is not None and longest > 1:
        metrics.pace.observe((call.ended_at - call.first_token_at) / (longest - 1))
    structlog.contextvars.bind_contextvars(
        call=generation.id,
        prefix=generation.prefix and str(generation.prefix.version.ref),
        prompt_tokens=generation.prompt_tokens,
        completion_tokens=call.tokens,
        finish_reasons=dict(reasons),
        timings=generation.timings,
    )


async def _events(pieces: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[bytes, None]:
    """A failure from here on can only be told inside of the stream."""
    try:
        async with aclosing(pieces):
            async for piece in pieces:
                yield sse.event(piece)
    except AntefixError as error:
        yield sse.event(errors.body(error))
    except Exception:
        _log.exception("unhandled")
        yield sse.event(errors.body(errors.unforeseen()))
    yield sse.DONE


def _check_known(field: str, token_ids: Iterable[int], frozen: FrozenModel) -> None:
    """Raises InvalidRequest for a token id that the model does not have."""
    size = frozen.vocabulary_size
    odd = next((token_id for token_id in token_ids if not 0 <= token_id < size), None)
    if odd is not None:
        expected = f"from 0 to {size - 1}, for the vocabulary has {size} tokens"
        raise InvalidRequest(f"{field}: token ids must be {expected}; got {odd}", param=field)


def _check_beams(fields: SamplingFields) -> None:
    if fields.num_beams == 1:
        return
    if fields.n > fields.num_beams:
        raise InvalidRequest(f"n must be at most num_beams, {fields.num_beams}, got {fields.n}", param="n")
    forms = {"structured_outputs": fields.structured_outputs, "response_format": fields.response_format}
    for name, form in forms.items():
        if form is not None and getattr(form, "type", None) != "text":
            raise InvalidRequest(f"{name} cannot go together with num_beams", param=name)


def _seeded(params: SamplingParams, index: int) -> SamplingParams:
    """Choice `index` of a prompt draws by `seed + index`, wrapped into 64 bits."""
    if params.seed is None:
        return params
    return dataclasses.replace(params, seed=(params.seed + index + 2**63) % 2**64 - 2**63)
