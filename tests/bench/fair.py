"""Section `fair`: how long a tenant's single request waits behind another tenant's 200.

Counted in steps, which do not depend on the machine: those until the first token, less those that the same request
takes alone. The control is the same request in the crowd's own line, where whoever comes first is served first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from prefix_store.model import frozen as models
from server.engine.engine import Engine
from server.scheduler.messages import GenerationRequest
from tests.bench import goals
from tests.bench.drive import engine_of, submit, timed_step
from tests.bench.progress import say
from tests.bench.results import Kept
from tests.bench.workload import W, Workload

SECTION = "fair"
CROWDED = replace(W, requests=200, prefixes=1)
CROWD, SINGLE = "a", "b"


@dataclass(frozen=True)
class Size:
    """How much of it. `prompts`: lengths of the single request's; `after`: steps that the crowd has had by then."""

    rows: int = 64
    step_tokens: int = 512
    prompts: tuple[int, ...] = (16, 800)
    after: tuple[int, ...] = (10, 37, 80)
    control: tuple[int, ...] = (37,)
    workload: Workload = CROWDED


@dataclass(frozen=True)
class Wait:
    """Steps and seconds until a request's first token."""

    steps: int
    seconds: float


def measure(kept: Kept, size: Size = Size()) -> dict[str, Any]:
    """Every length at every moment, alone, behind the crowd, and in the crowd's line."""
    cases = []
    for length in size.prompts:
        alone = wait(_engine(size), 0, _single(length, SINGLE), size)
        for after in size.after:
            found = wait(_engine(size), after, _single(length, SINGLE), size)
            cases.append(_case(length, after, found, alone, "fair"))
        for after in size.control:
            found = wait(_engine(size), after, _single(length, CROWD), size)
            cases.append(_case(length, after, found, alone, "first come, first served"))
        say(f"a prompt of {length} tokens: {[case['delay_steps'] for case in cases if case['prompt'] == length]} steps")
    fair = [case["delay_steps"] for case in cases if case["order"] == "fair"]
    control = [case["delay_steps"] for case in cases if case["order"] != "fair"]
    return {
        "what": f"bundled model; one tenant has {size.workload.requests} requests and all {size.rows} rows, "
        "another sends one",
        "cases": cases,
        "first_come_first_served_steps": min(control),
        "goals": {"steps of delay beyond its own, at most": goals.at_most(max(fair), 2, "steps")},
    }


def wait(engine: Engine, after: int, single: GenerationRequest, size: Size) -> Wait:
    """Runs the crowd for so many steps, if any, and then counts those until the single request's first token."""
    if after:
        items = size.workload.items(engine.frozen.vocabulary_size)
        submit(engine, size.workload.requests_for(items, tenant=CROWD))
    for _ in range(after):
        engine.step()
    if after and len(engine.scheduler.running) < size.rows:
        raise RuntimeError("the crowd has not taken every row")
    engine.scheduler.add(single, seed=0)
    seconds, steps = 0.0, 0
    while True:
        took, events = timed_step(engine)
        seconds, steps = seconds + took, steps + 1
        if any(event.request_id == single.id and event.token_ids for event in events):
            engine.scheduler.check_integrity()
            return Wait(steps, seconds)


def _engine(size: Size) -> Engine:
    frozen = models.load(models.BUNDLED)
    return engine_of(
        frozen, slots=32_768, rows=size.rows, step_tokens=size.step_tokens, waiting=size.workload.requests + 1
    )


def _single(length: int, tenant: str) -> GenerationRequest:
    return GenerationRequest("single", tenant, tuple(range(2, 2 + length)), replace(W, new_tokens=8).params())


def _case(length: int, after: int, found: Wait, alone: Wait, order: str) -> dict[str, Any]:
    return {
        "prompt": length,
        "after_steps": after,
        "order": order,
        "steps": found.steps,
        "alone_steps": alone.steps,
        "delay_steps": found.steps - alone.steps,
        "first_token_ms": round(1000 * found.seconds, 2),
        "alone_ms": round(1000 * alone.seconds, 2),
    }


def table(measured: dict[str, Any]) -> str:
    """The worst delay, its goal, and what it would be otherwise."""
    lines = goals.table("one request against a tenant with 200", measured["goals"])
    return f"{lines}\n| in order of arrival, at least | {measured['first_come_first_served_steps']} steps | |"
