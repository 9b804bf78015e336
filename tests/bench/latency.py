"""Section `latency`: how long a user waits for the first token and for each next one, at half and at nearly full load.

Requests arrive independently of one another and of how the engine keeps up. The load is a share of what the engine was
measured to do with all rows taken.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from server.engine.engine import Engine
from server.engine.loop import EngineLoop
from server.scheduler.messages import PrefixPayload
from tests.bench import goals, plots, traffic, workload
from tests.bench.drive import beside, engine_of, is_busy, submit, timed_step
from tests.bench.progress import say
from tests.bench.results import Kept, percentile, percentiles
from tests.bench.shapes import LLAMA_19M, Shape
from tests.bench.workload import Item, W, Workload

SECTION = "latency"
PLOT = "latency.svg"
HALF, NEARLY_FULL, LONG = "50 % load", "90 % load", "90 % load, another tenant's long prompts in it"
FURTHER_MS = 5  # that a first token may take beyond its prefill and a step
OTHER = "another"  # tenant, who sends the long prompts
QUANTILES = (*range(1, 100), 99.5, 99.9)


@dataclass(frozen=True)
class Size:
    """How much of it. `long_share`: of the requests; `warm`: visits left out, for they find the engine empty.

    `rounds`: of all loads, each after its own measure of what is a full one, for a machine is not always as fast.
    """

    shape: Shape = LLAMA_19M
    rows: int = 64
    slots: int = 65_536
    workload: Workload = W
    saturating: int = 384
    seconds: float = 20.0
    most: int = 2_000
    warm: int = 32
    unloaded: int = 30
    long_prompt: int = 4_000
    long_share: float = 0.05
    rounds: int = 3


def measure(kept: Kept, size: Size = Size()) -> dict[str, Any]:
    """Alone, at capacity, and then at each load."""
    engine = engine_of(size.shape.frozen(), slots=size.slots, rows=size.rows)
    payloads = workload.payloads(size.workload, engine.frozen.geometry)
    alone = kept.part("alone", lambda: _alone(engine, payloads, size))

    def drive(loop: EngineLoop) -> tuple[dict[str, float], list[float], dict[str, list[dict[str, Any]]]]:
        unloaded = kept.part("unloaded", lambda: _unloaded(loop, payloads, size))
        say(f"alone {alone}; unloaded {unloaded}")
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in (HALF, NEARLY_FULL, LONG)}
        capacities = []
        for number in range(size.rounds):
            capacity = kept.part(f"capacity, {number}", lambda: _capacity(loop, payloads, size))
            capacities.append(capacity)
            for name, share, long in ((HALF, 0.5, 0.0), (NEARLY_FULL, 0.9, 0.0), (LONG, 0.9, size.long_share)):
                rate = share / (1 / capacity + long * alone["long_prefill_ms"] / 1000)
                found = kept.part(f"{name}, {number}", lambda r=rate, s=long: _scenario(loop, payloads, r, s, size))
                rounds[name].append(found)
                say(f"{name}: first token {found['first_token_ms']}, next {found['gap_ms']} ms")
        return unloaded, capacities, rounds

    unloaded, capacities, rounds = beside(engine, drive)
    scenarios = {name: _middle(found) for name, found in rounds.items()}
    allowed = alone["prefill_ms"] + alone["step_ms"] + FURTHER_MS
    return {
        "what": f"{size.shape.name}, float32, {size.rows} rows, requests as in W",
        "capacity_requests_per_second": [round(capacity, 2) for capacity in capacities],
        "alone": alone,
        "unloaded_first_token_ms": unloaded,
        "scenarios": scenarios,
        "goals": {
            "first token unloaded (prefill, one step and 5 ms), p50": goals.at_most(
                unloaded["p50"], round(allowed, 2), "ms"
            )
        }
        | {
            f"p99 between tokens, of the median: {name}": goals.at_most(_ratio(found), 2, "×")
            for name, found in scenarios.items()
        },
    }


def _ratio(found: dict[str, Any]) -> float:
    ratio: float = found["gap_ms"]["p99"] / found["gap_ms"]["p50"]
    return ratio


def _middle(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The round with the median ratio; `ratios`: of all."""
    ranked = sorted(rounds, key=_ratio)
    return {**ranked[len(ranked) // 2], "ratios": [round(_ratio(found), 2) for found in rounds]}


def _alone(engine: Engine, payloads: Sequence[PrefixPayload], size: Size) -> dict[str, float]:
    """Milliseconds on an idle engine without a loop: a prompt's step, one that decodes, and a long prompt's steps."""
    items = size.workload.items(size.shape.vocabulary)[: size.unloaded]
    prefills, steps = [], []
    for request in replace(size.workload, new_tokens=4).requests_for(items, payloads):
        submit(engine, [request])
        prefills.append(_until_token(engine))
        steps.append(timed_step(engine)[0])
        while is_busy(engine):
            engine.step()
    long = _long(size, 0)
    submit(engine, replace(size.workload, new_tokens=1).requests_for([long], payloads))
    return {
        "prefill_ms": round(1000 * statistics.median(prefills), 2),
        "step_ms": round(1000 * statistics.median(steps), 2),
        "long_prefill_ms": round(1000 * _until_token(engine), 2),
    }


def _until_token(engine: Engine) -> float:
    seconds = 0.0
    while True:
        took, events = timed_step(engine)
        seconds += took
        if any(event.token_ids for event in events):
            return seconds


def _unloaded(loop: EngineLoop, payloads: Sequence[PrefixPayload], size: Size) -> dict[str, float]:
    items = size.workload.items(size.shape.vocabulary)[: size.unloaded]
    requests = replace(size.workload, new_tokens=4).requests_for(items, payloads)
    visits = traffic.closed(loop, len(requests), 1, lambda index, visit: requests[index])
    return percentiles([visit.first_token for visit in visits], scale=1000)


def _capacity(loop: EngineLoop, payloads: Sequence[PrefixPayload], size: Size) -> float:
    """Requests per second when there are always as many as there are rows."""
    items = replace(size.workload, requests=size.saturating).items(size.shape.vocabulary, seed=1)
    requests = traffic.staggered(size.workload.requests_for(items, payloads))
    visits = traffic.closed(loop, len(requests), size.rows, lambda index, visit: requests[index])
    return traffic.rate(visits) / size.workload.new_tokens


def _scenario(
    loop: EngineLoop, payloads: Sequence[PrefixPayload], per_second: float, long_share: float, size: Size
) -> dict[str, Any]:
    count = min(size.most, int(per_second * size.seconds))
    items = replace(size.workload, requests=count).items(size.shape.vocabulary, seed=2)
    every = round(1 / long_share) if long_share else count + 1
    are_long = [index % every == every - 1 for index in range(count)]
    items = [
        _long(size, index) if long else item for index, (item, long) in enumerate(zip(items, are_long, strict=True))
    ]
    begun = time.perf_counter()
    requests = [
        replace(request, tenant=OTHER) if long else request
        for request, long in zip(size.workload.requests_for(items, payloads), are_long, strict=True)
    ]
    visits = traffic.poisson(loop, requests, per_second)
    took = time.perf_counter() - begun
    users = [v for v, long in zip(visits, are_long, strict=True) if not long][size.warm :]
    return {
        "requests_per_second": round(per_second, 2),
        "requests": count,
        "long_prompts": sum(are_long),
        "seconds": round(took, 1),
        "first_token_ms": percentiles([visit.first_token for visit in users], scale=1000),
        "gap_ms": percentiles(traffic.gaps(users), scale=1000),
        "first_token_curve_ms": _curve([visit.first_token for visit in users]),
        "gap_curve_ms": _curve(traffic.gaps(users)),
    }


def _long(size: Size, index: int) -> Item:
    return Item((2,) * size.long_prompt, index % size.workload.prefixes)


def _curve(seconds: Sequence[float]) -> list[float]:
    """The values at QUANTILES."""
    return [round(1000 * percentile(seconds, percent), 2) for percent in QUANTILES]


def plot(measured: dict[str, Any]) -> None:
    """Which share of users waited no longer than so many milliseconds."""
    panels = []
    for x, curve in (("ms to the first token", "first_token_curve_ms"), ("ms between tokens", "gap_curve_ms")):
        curves = {name: (found[curve], QUANTILES) for name, found in measured["scenarios"].items()}
        panels.append(plots.Panel(x, "percent of all", curves, logarithmic=True))
    plots.draw(PLOT, panels)


def table(measured: dict[str, Any]) -> str:
    """The loads, p50 / p90 / p99, of each the round with the median ratio."""
    lines = [
        f"| {measured['what']} | first token, ms: p50 / p90 / p99 | between tokens | p99 / median | of all rounds |"
    ]
    lines.append("|---|---|---|---|---|")
    lines.append(f"| unloaded | {_three(measured['unloaded_first_token_ms'])} | | | |")
    for name, found in measured["scenarios"].items():
        cells = (name, _three(found["first_token_ms"]), _three(found["gap_ms"]), f"{_ratio(found):.2f}")
        lines.append(f"| {' | '.join(cells)} | {', '.join(f'{ratio:.2f}' for ratio in found['ratios'])} |")
    return "\n".join(lines) + f"\n\n![latency](docs/results/{PLOT})"


def _three(found: dict[str, float]) -> str:
    return " / ".join(f"{found[name]:.0f}" if found[name] >= 100 else f"{found[name]:.1f}" for name in found)
