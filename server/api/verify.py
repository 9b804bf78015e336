"""POST /v1/prefixes/{ref}/verify: whether a row among others is the same request alone, and plain transformers."""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request

from prefix_store.errors import AntefixError
from prefix_store.prefix import PrefixVersion
from server.api import aside, references, sse
from server.api.auth import Caller, Calling
from server.api.calls import Call
from server.api.references import ServedPrefix
from server.api.services import Services, Serving
from server.engine import agreement, reference
from server.engine.agreement import Answer, Difference, Judge
from server.scheduler.messages import GenerationRequest, PrefixPayload
from server.scheduler.sampling_params import SamplingParams

# How long the prompts are, how much is answered, how many of the tenant's other prefixes run beside it.
PROMPTS, ANSWER, NEIGHBOURS = (1, 4, 11, 23), 12, 4
LOOKED_AT = 20
# How often the mixed batch is asked for until rows did run beside.
ATTEMPTS = 3
ALTERNATIVES = 5
router = APIRouter(prefix="/v1/prefixes")
Prompt = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One request: a prompt after a prefix, or after none."""

    prompt: Prompt
    prefix: PrefixPayload | None


@dataclass(frozen=True)
class Evidence:
    """What the engine answered to each prompt in a mixed batch and alone; `beside`: rows that ran beside each."""

    mixed: Sequence[Answer]
    alone: Sequence[Answer]
    beside: int


@router.post("/{ref:path}/verify")
async def verify(request: Request, ref: str, services: Serving, caller: Calling) -> dict[str, Any]:
    """Asks the running engine, like any caller would, and then transformers; the reply has every difference."""
    await request.body()
    return await sse.unless_gone(request.receive, _verify(ref, services, caller))


async def _verify(ref: str, services: Services, caller: Caller) -> dict[str, Any]:
    prefix = await references.load(services, ref, caller)
    others = await _others(services, caller, prefix)
    evidence = await _ask(services, caller, prefix.payload, [other.payload for other in others])
    found = await aside.run(services, partial(_judge, services, prefix, others, evidence))
    return {"object": "prefix.verification", "prefix": prefix.to_json(), **found}


async def _others(services: Services, caller: Caller, prefix: ServedPrefix) -> list[ServedPrefix]:
    """Some of the tenant's other prefixes that this model can serve."""
    found: list[ServedPrefix] = []
    page = partial(services.store.prefixes.page, caller.tenant, limit=LOOKED_AT)
    versions: list[PrefixVersion] = await to_thread.run_sync(page)
    for version in versions:
        with suppress(AntefixError):
            has_room = version.virtual_tokens + max(PROMPTS) + ANSWER <= services.frozen.context_length
            if version.digest != prefix.version.digest and has_room and len(found) < NEIGHBOURS:
                found.append(await references.load(services, version.name, caller))
    return found


async def _ask(services: Services, caller: Caller, prefix: PrefixPayload, others: Sequence[PrefixPayload]) -> Evidence:
    prompts = _prompts(services, prefix)
    rows = [Row(prompt, prefix) for prompt in prompts]
    for shift, other in enumerate([None, *others], start=1):
        rows += [Row(prompts[(index + shift) % len(prompts)], other) for index in range(2)]
    for _ in range(ATTEMPTS):
        mixed, beside = await _run(services, caller, rows, of_interest=len(prompts))
        if beside:  # on a busy server a row of few tokens may end before its neighbours begin
            break
    alone = [(await _run(services, caller, [row], of_interest=1))[0][0] for row in rows[: len(prompts)]]
    return Evidence(mixed, alone, beside)


def _prompts(services: Services, prefix: PrefixPayload) -> list[Prompt]:
    """Random tokens, the same for the same prefix, as long as there is room behind it."""
    room, draws = services.frozen.context_length - prefix.virtual_tokens - 1, random.Random(prefix.digest)
    lengths = [max(1, min(length, room // 2)) for length in PROMPTS]
    return [tuple(draws.choices(range(services.frozen.vocabulary_size), k=length)) for length in lengths]


async def _run(services: Services, caller: Caller, rows: Sequence[Row], of_interest: int) -> tuple[list[Answer], int]:
    """Answers to the first rows, and how many rows at least ran at the same time as each of them."""
    name = f"verify-{uuid.uuid4().hex}"
    requests = [_request(f"{name}-{index}", row, services, caller) for index, row in enumerate(rows)]
    call = Call(services.loop, requests, services.frozen.tokenizer, services.clock)
    order: list[int] = []
    try:
        call.submit()
        async for delta in call.deltas():
            order.append(delta.index)
    finally:
        call.abort()
    answers = [
        Answer(made.prompt_ids, tuple(choice.logprobs), made.source_ids)
        for made, choice in zip(requests, call.choices, strict=True)
    ]
    return answers[:of_interest], min(_beside(index, order) for index in range(of_interest))


def _request(name: str, row: Row, services: Services, caller: Caller) -> GenerationRequest:
    taken = len(row.prompt) + (row.prefix.virtual_tokens if row.prefix is not None else 0)
    room = services.frozen.context_length - taken
    params = SamplingParams(
        max_tokens=max(1, min(ANSWER, room)), temperature=0.0, ignore_eos=True, logprobs=ALTERNATIVES
    )
    if services.frozen.is_encoder_decoder:  # without rules of its own, which are no part of its logits
        start = (services.frozen.start_id,)
        return GenerationRequest(name, caller.tenant, start, params, row.prefix, source_ids=row.prompt)
    return GenerationRequest(name, caller.tenant, row.prompt, params, row.prefix)


def _beside(index: int, order: Sequence[int]) -> int:
    """Rows with a token between the first and the last token of the row, by the order in which tokens came."""
    first, last = order.index(index), len(order) - 1 - order[::-1].index(index)
    return len(set(order[first:last]) - {index})


def _judge(
    services: Services, prefix: ServedPrefix, others: Sequence[ServedPrefix], evidence: Evidence
) -> dict[str, Any]:
    """Plain transformers on every answer, with the prefix and, to know that it would show, without. Blocking."""
    judge = Judge(services.frozen, prefix.payload)
    logits = [judge.logits(answer) for answer in evidence.mixed]
    tie = agreement.tolerance(services.frozen, logits)
    mixed = [agreement.with_logits(*pair, tie) for pair in zip(evidence.mixed, logits, strict=True)]
    alone = [agreement.with_logits(answer, judge.logits(answer), tie) for answer in evidence.alone]
    triples = zip(evidence.mixed, evidence.alone, logits, strict=True)
    pairs = [agreement.with_other(*triple, tie) for triple in triples]
    checks = [
        _check("in a mixed batch, as plain transformers", mixed, tie),
        _check("alone, as plain transformers", alone, tie),
        _check("in a mixed batch, as alone", pairs, tie),
    ]
    wrong: list[tuple[str, PrefixPayload | None]] = [("without the prefix", None)]
    wrong += [(f"with {_name(other)} instead", other.payload) for other in others[:1]]
    least = agreement.APART * max(sum(found, Difference()).mean for found in (mixed, alone))
    controls = [_control(name, Judge(services.frozen, payload), evidence.mixed, least) for name, payload in wrong]
    return {
        "ok": evidence.beside > 0 and all(part["ok"] for part in checks + controls),
        "checks": checks,
        "controls": controls,
        "rows_beside": evidence.beside,
        "neighbours": [_name(other) for other in others],
        "prompts": len(evidence.mixed),
        "tokens": sum(len(answer.entries) for answer in evidence.mixed),
        "reference": "transformers" if judge.is_plain else "transformers with the attention that training uses",
        "computed_with": reference.weights(services.frozen),
    }


def _check(name: str, parts: Sequence[Difference], tie: float) -> dict[str, Any]:
    found = sum(parts, Difference())
    return {
        "name": name,
        "ok": found.tokens_differ == 0 and found.largest <= tie,
        "tokens_differ": found.tokens_differ,
        "near_ties": found.near_ties,
        "max_logprob_difference": found.largest,
        "tolerance": tie,
    }


def _control(name: str, judge: Judge, answers: Sequence[Answer], least: float) -> dict[str, Any]:
    """A wrong prefix must be told from the right one, or the checks have shown nothing."""
    parts = [agreement.with_logits(answer, judge.logits(answer), 0.0) for answer in answers]
    mean = sum(parts, Difference()).mean
    return {"name": name, "ok": mean > least, "mean_logprob_difference": mean, "at_least": least}


def _name(prefix: ServedPrefix) -> str:
    return f"{prefix.version.name}@{prefix.version.version}"
