"""Section `growth`: what a decoding step costs, by rows, by how long they are, and by how long their prefix is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from server.engine.engine import Engine
from server.engine.kv_pool import bytes_per_slot
from tests.bench import machine, plots, workload
from tests.bench.drive import decode_seconds, engine_of
from tests.bench.progress import say
from tests.bench.results import Kept
from tests.bench.shapes import LLAMA_19M, Shape
from tests.bench.workload import Workload

SECTION = "growth"
ROWS, PROMPT, PREFIX = "rows", "prompt tokens a row", "virtual tokens"
PLOT = "growth.svg"


@dataclass(frozen=True)
class Size:
    """How much of it; where one of the three is varied, the others are as `usual` says: rows, prompt, prefix."""

    shape: Shape = LLAMA_19M
    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 96, 128)
    prompts: tuple[int, ...] = (16, 128, 256, 512, 1_024)
    prefixes: tuple[int, ...] = (16, 128, 512, 1_024, 2_048, 4_096)
    usual: tuple[int, int, int] = (64, 64, 20)
    steps: int = 15
    slots: int = 90_000
    read_bytes: int = machine.READ_BYTES


def measure(kept: Kept, size: Size = Size()) -> dict[str, Any]:
    """Three curves, a line through each, and what the lines mean."""
    rows, prompt, prefix = size.usual
    swept = {
        ROWS: (size.rows, lambda n: (n, prompt, prefix)),
        PROMPT: (size.prompts, lambda n: (rows, n, prefix)),
        PREFIX: (size.prefixes, lambda n: (rows, prompt, n)),
    }
    # all prompts in one step, lest the first rows be far ahead when the last have come
    engine = engine_of(size.shape.frozen(), slots=size.slots, rows=max(*size.rows, rows), step_tokens=size.slots)
    curves = {}
    for name, (points, at) in swept.items():
        seconds = [kept.part(f"{name} {n}", lambda n=n, at=at: step_seconds(engine, *at(n), size)) for n in points]
        curves[name] = {"at": list(points), "ms": [round(1000 * found, 3) for found in seconds]} | fit(points, seconds)
        say(f"{name}: {curves[name]['ms']} ms")
    rate = kept.part("reads", lambda: machine.read_rate(size.read_bytes))
    slot = bytes_per_slot(engine.frozen.geometry, engine.frozen.dtype)
    return {
        "what": f"{size.shape.name}, float32: a decoding step of {rows} rows with prompts of {prompt} tokens after one "
        f"prefix of {prefix} virtual tokens, one of the three varied",
        "curves": curves,
        "meaning": explain(curves, rows, slot, rate),
        "goals": {},
    }


def step_seconds(engine: Engine, rows: int, prompt: int, prefix: int, size: Size) -> float:
    """Median seconds of a step in which so many rows decode."""
    load = Workload(rows, 1, prefix, (prompt, prompt), new_tokens=size.steps + 64)
    engine.scheduler.residency.clear()
    payloads = workload.payloads(load, engine.frozen.geometry)
    return decode_seconds(engine, load.requests_for(load.items(size.shape.vocabulary), payloads), size.steps)


def fit(points: Sequence[int], seconds: Sequence[float]) -> dict[str, float]:
    """The straight line through the points: ms at zero, and microseconds for each further one."""
    slope, zero = numpy.polyfit(points, seconds, 1)
    return {"zero_ms": round(1000 * float(zero), 3), "slope_us": round(1e6 * float(slope), 4)}


def explain(curves: dict[str, Any], rows: int, slot_bytes: int, bytes_per_second: float) -> list[str]:
    """What each slope is made of, in a sentence."""
    row, prompt, prefix = (curves[name]["slope_us"] for name in (ROWS, PROMPT, PREFIX))
    read = 1e6 * slot_bytes / bytes_per_second
    rate = read / (prompt / rows) if prompt > 0 else math.inf  # so few tokens that noise is all there is
    saved = 1 - prefix / prompt if prompt > 0 else 0.0
    return [
        f"A further row costs {row:.0f} µs on top of {curves[ROWS]['zero_ms']:.1f} ms: weights are read once a step "
        f"for all rows, so from one row to {max(curves[ROWS]['at'])} a step takes "
        f"{curves[ROWS]['ms'][-1] / curves[ROWS]['ms'][0]:.1f} times as long.",
        f"A further own token in each of {rows} rows costs {prompt:.1f} µs, {prompt / rows:.3f} µs a row: reading its "
        f"{slot_bytes / 1024:.0f} KiB of keys and values at this machine's {bytes_per_second / 1e9:.0f} GB/s takes "
        f"{read:.3f} µs, so attention runs at {rate:.0%} of that rate.",
        f"A further virtual token costs {prefix:.1f} µs for all {rows} rows together, {saved:.0%} less than an own "
        "token in each: the prefix is read once for all of them, and what remains is arithmetic.",
    ]


def plot(measured: dict[str, Any]) -> None:
    """The three curves with their lines."""
    panels = []
    for name, curve in measured["curves"].items():
        line = [curve["zero_ms"] + curve["slope_us"] / 1000 * at for at in curve["at"]]
        panels.append(
            plots.Panel(name, "ms a step", {"measured": (curve["at"], curve["ms"]), "line": (curve["at"], line)})
        )
    plots.draw(PLOT, panels)


def table(measured: dict[str, Any]) -> str:
    """The lines and what they mean."""
    lines = ["| a decoding step, by | at zero | for each further one |", "|---|---|---|"]
    for name, curve in measured["curves"].items():
        lines.append(f"| {name} | {curve['zero_ms']:.2f} ms | {curve['slope_us']:.2f} µs |")
    meaning = "\n".join(f"- {sentence}" for sentence in measured["meaning"])
    return "\n".join(lines) + f"\n\n{meaning}\n\n![step time](docs/results/{PLOT})"
