"""Requests with grammars, run by a real engine over a tiny model whose tokens are bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from typing import Any

from prefix_store.model.frozen import FrozenModel
from server.engine.engine import Engine
from server.engine.grammar import Grammar, Kind, Matcher, Source
from server.engine.grammars import Grammars
from server.scheduler.messages import FinishReason, GenerationRequest
from server.scheduler.sampling_params import SamplingParams
from tests.models import EOS, VOCABULARY

RECORD = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "ü"]}, "maxItems": 3},
    },
    "required": ["id", "tags"],
    "additionalProperties": False,
}


def as_json(schema: Any) -> Source:
    return Source(Kind.JSON, json.dumps(schema))


def grammar(grammars: Grammars, source: Source | str, tenant: str = "t") -> Grammar:
    """A string is a regular expression."""
    return grammars.compile(tenant, source if isinstance(source, Source) else Source(Kind.REGEX, source), "asked")


def request(
    name: str, made: Grammar | None = None, prompt: Iterable[int] = (5, 6, 7), prefix: Any = None, **params: Any
) -> GenerationRequest:
    chosen = SamplingParams(**{"max_tokens": 100, "temperature": 0.9, "seed": 1, **params})
    return GenerationRequest(name, "t", tuple(prompt), chosen, prefix, grammar=made)


def run(engine: Engine, requests: Iterable[GenerationRequest]) -> dict[str, tuple[list[int], FinishReason | None]]:
    """The tokens of each, and why it ended; an error is raised."""
    found: dict[str, tuple[list[int], FinishReason | None]] = {}
    for made in requests:
        engine.scheduler.add(made, made.params.seed or 0)
        found[made.id] = ([], None)
    while any(reason is None for _, reason in found.values()):
        for event in engine.step():
            assert event.error is None, event.error
            found[event.request_id][0].extend(event.token_ids)
            found[event.request_id] = (found[event.request_id][0], event.finish_reason)
    engine.scheduler.check_integrity()
    return found


def text(frozen: FrozenModel, tokens: Iterable[int]) -> str:
    decoded: str = frozen.tokenizer.decode(list(tokens))
    return decoded


def walk(matcher: Matcher, seed: int = 0, most: int = 200) -> list[int]:
    """A random answer, to its end."""
    draw, answer = random.Random(seed), []
    while len(answer) < most:
        matcher.read(answer)
        token = int(draw.choice(matcher.allowed(VOCABULARY).nonzero()[0]))
        if token == EOS:
            break
        answer.append(token)
    return answer
