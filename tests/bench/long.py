"""Section `long`: 64 rows on one prefix of 2,048 tokens, read once a step, against a copy of it for every request."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from server.engine.attention import BACKENDS
from server.engine.attention.work import Mask, Part, WorkItem
from server.engine.engine import default_backend
from server.engine.kv_pool import bytes_per_slot
from server.scheduler.messages import PrefixPayload
from tests.bench import goals
from tests.bench.drive import decode_seconds, engine_of
from tests.bench.progress import say
from tests.bench.results import Kept
from tests.bench.shapes import LLAMA_150M, Shape
from tests.bench.workload import Workload, payload

SECTION = "long"
SHARED, COPIED, VIEWS = "one prefix for all rows", "a copy a request, same kernel", "a copy a request, sdpa on views"
# Float32 sums in another order, of values around one.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Size:
    """How much of it. `own`: slots of a row's own tokens when attention alone is timed; `cycled`: layers of copies that
    take turns, enough not to stay in cache.
    """

    shape: Shape = LLAMA_150M
    rows: int = 64
    virtual_tokens: int = 2_048
    own: int = 64
    cycled: int = 2
    steps: int = 12
    best_of: int = 5


def measure(kept: Kept, size: Size = Size()) -> dict[str, Any]:
    """The attention operator of all layers by itself, and whole decoding steps."""
    layer = kept.part("attention alone", lambda: attention(size))
    say(f"attention alone, ms a step: {layer['ms_a_step']}")
    steps: dict[str, Any] = {}
    for name, backend in ((SHARED, None), (COPIED, None), (VIEWS, "cpu")):
        steps[name] = kept.part(name, lambda n=name, b=backend: _whole_steps(size, n, b))
        say(f"whole steps, {name}: {steps[name]}")
    alone = layer["ms_a_step"]
    return {
        "what": f"{size.shape.name}, float32: {size.rows} rows that decode after a prefix of {size.virtual_tokens:,}",
        "attention_ms": alone,
        "steps": steps,
        "goals": {
            "attention alone, against a copy a request by sdpa on views": goals.at_least(
                alone[VIEWS] / alone[SHARED], 3, "×"
            ),
            "attention alone, against a copy a request by the same kernel": goals.at_least(
                alone[COPIED] / alone[SHARED], 1, "×"
            ),
            "slots that the prefix takes, of what copies take": goals.at_most(
                steps[SHARED]["prefix_slots"] / steps[COPIED]["prefix_slots"], 1 / size.rows
            ),
        },
    }


@torch.inference_mode()
def attention(size: Size) -> dict[str, Any]:
    """Seconds of attention over all layers of a step, three ways that agree with one another."""
    geometry = size.shape.changed(num_hidden_layers=1).frozen().geometry
    layers = int(size.shape.numbers["num_hidden_layers"])
    kernel = BACKENDS["native" if default_is_native(size) else "cpu"]
    scale = geometry.head_dim**-0.5
    generator = torch.Generator().manual_seed(5)
    query = torch.randn(size.rows, geometry.query_heads, geometry.head_dim, generator=generator)
    prefix, own, width = size.virtual_tokens, size.own, size.virtual_tokens + size.own

    def slots(count: int, layers: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (layers, count, geometry.kv_heads, geometry.head_dim)
        return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)

    shared = slots(prefix + size.rows * own, layers)
    copies = tuple(_copied(pool[: size.cycled], size) for pool in shared)
    once = _work(
        [(Part.OWN, row, row + 1, prefix + row * own, prefix + (row + 1) * own) for row in range(size.rows)]
        + [(Part.PREFIX, 0, size.rows, 0, prefix)]
    )
    each = _work([(Part.OWN, row, row + 1, row * width, (row + 1) * width) for row in range(size.rows)])

    def ours(layer: int) -> torch.Tensor:
        return kernel(query, shared[0][layer], shared[1][layer], once, window=0, scale=scale, softcap=0.0)

    def copied(layer: int) -> torch.Tensor:
        index = layer % size.cycled
        return kernel(query, copies[0][index], copies[1][index], each, window=0, scale=scale, softcap=0.0)

    def views(layer: int) -> torch.Tensor:
        return torch.cat([_sdpa(query[row], copies, layer % size.cycled, row, width) for row in range(size.rows)])

    worst = max(float((ours(0) - other(0)).abs().max()) for other in (copied, views))
    assert worst < TOLERANCE, f"sharing changes attention by {worst:.1e}"
    arms = {SHARED: ours, COPIED: copied, VIEWS: views}
    return {
        "ms_a_step": {name: round(1000 * _median(arm, layers, size.best_of), 3) for name, arm in arms.items()},
        "largest_difference": worst,
    }


def default_is_native(size: Size) -> bool:
    """Whether this machine's engine would take the native kernel."""
    return default_backend(size.shape.changed(num_hidden_layers=1).frozen()) == "native"


def _copied(pool: torch.Tensor, size: Size) -> torch.Tensor:
    """`[layers, rows * (prefix + own), Hkv, D]`: every row's own extent begins with a copy of the prefix."""
    prefix = pool[:, None, : size.virtual_tokens].expand(-1, size.rows, -1, -1, -1)
    own = pool[:, size.virtual_tokens :].unflatten(1, (size.rows, size.own))
    return torch.cat([prefix, own], dim=2).flatten(1, 2)


def _work(items: Sequence[tuple[Part, int, int, int, int]]) -> torch.Tensor:
    return torch.tensor([WorkItem(part, Mask.FULL, *rest, 0, 0).as_tuple() for part, *rest in items])


def _sdpa(query: torch.Tensor, copies: Sequence[torch.Tensor], layer: int, row: int, width: int) -> torch.Tensor:
    """One row by torch's attention over views of its extent; a group's heads are queries, so keys are read once."""
    keys, values = (pool[layer, row * width : (row + 1) * width].transpose(0, 1)[None] for pool in copies)
    grouped = query.unflatten(0, (keys.shape[1], -1))[None]
    return functional.scaled_dot_product_attention(grouped, keys, values).flatten(1, 2)


def _median(attend: Callable[[int], torch.Tensor], layers: int, runs: int) -> float:
    found = []
    for _ in range(runs):
        begun = time.perf_counter()
        for layer in range(layers):
            attend(layer)
        found.append(time.perf_counter() - begun)
    return statistics.median(found)


def _whole_steps(size: Size, name: str, backend: str | None) -> dict[str, Any]:
    frozen = size.shape.frozen()
    copies = 1 if name == SHARED else size.rows
    workload = Workload(size.rows, copies, size.virtual_tokens, (8, 16), new_tokens=size.steps + 16)
    slots = copies * size.virtual_tokens + size.rows * 64
    engine = engine_of(frozen, slots=max(slots, 512), backend=backend, rows=size.rows)
    requests = workload.requests_for(
        workload.items(size.shape.vocabulary), _same(size, frozen.geometry.kv_shape, copies)
    )
    seconds = decode_seconds(engine, requests, size.steps)
    resident = sum(found.extent.size for found in engine.scheduler.residency.residents())
    return {
        "ms_a_step": round(1000 * seconds, 2),
        "prefix_slots": resident,
        "prefix_mb": round(resident * bytes_per_slot(frozen.geometry, frozen.dtype) / 1e6, 1),
    }


def _same(size: Size, kv_shape: tuple[int, int, int, int], count: int) -> list[PrefixPayload]:
    """`count` prefixes of one content: to the engine, which goes by digest, they are different ones."""
    layers, two, heads, dim = kv_shape
    kv = torch.randn(layers, two, heads, size.virtual_tokens, dim, generator=torch.Generator().manual_seed(6))
    one = payload("0", kv)
    return [replace(one, digest=str(index)) for index in range(count)]


def table(measured: dict[str, Any]) -> str:
    """The three ways, and the goals."""
    lines = [f"| {measured['what']} | attention, ms a step | whole step, ms | prefix, MB |", "|---|---|---|---|"]
    for name, step in measured["steps"].items():
        lines.append(
            f"| {name} | {measured['attention_ms'][name]:.1f} | {step['ms_a_step']:.0f} | {step['prefix_mb']:,.0f} |"
        )
    return "\n".join(lines) + "\n\n" + goals.table("long prefix", measured["goals"])
