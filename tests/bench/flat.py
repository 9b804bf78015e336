"""Section `flat`: does it matter how many prefixes are stored? From 1 to 10,000, of which the device holds 128.

Every prefix is published to an embedded store on disk and comes from there as in the server: resolved, read, verified
and cast by the loader on a thread beside the engine's. Files are dropped from the system's cache first, and each run
has a loader of its own, so the first use of a prefix really reads the disk.
"""

from __future__ import annotations

import itertools
import os
import random
import statistics
import tempfile
from bisect import bisect_left
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from prefix_store.model import frozen as models
from prefix_store.model.frozen import FrozenModel
from prefix_store.prefix import Method, PrefixManifest, PrefixRef, PrefixVersion
from prefix_store.store import Store
from server.engine.loop import EngineLoop, EngineStats
from server.engine.prefix_loader import PrefixLoader
from server.scheduler.messages import GenerationRequest
from tests.bench import goals, traffic
from tests.bench.drive import beside, engine_of
from tests.bench.progress import say
from tests.bench.results import Kept, paired_ratio, percentiles
from tests.bench.traffic import Visit
from tests.bench.workload import W, Workload

SECTION = "flat"
TENANT = "bench"
COLD, WARM = "cold", "warm"
PUBLISHERS = 8


@dataclass(frozen=True)
class Size:
    """How much of it; `resident` is the level whose prefixes all stay on the device, which the others are held to."""

    stored: tuple[int, ...] = (1, 32, 1_000, 10_000)
    resident: int = 32
    on_device: int = 128
    rows: int = 64
    requests: int = 448
    rounds: int = 5
    host_bytes: int = 2 << 30
    workload: Workload = W


def measure(kept: Kept, size: Size = Size()) -> dict[str, Any]:
    """Publishes as many as there are to be, and then runs the same requests over more and more of them in turns."""
    frozen = models.load(models.BUNDLED)
    with tempfile.TemporaryDirectory(prefix="antefix-bench-") as folder:
        store = Store.open(f"sqlite:///{folder}/store.db")
        versions = publish(store, frozen, max(size.stored), size.workload.virtual_tokens)
        say(f"{len(versions)} prefixes published, {sum(v.size_bytes for v in versions) / 1e6:.0f} MB")
        runs: dict[str, list[dict[str, Any]]] = {str(count): [] for count in size.stored}
        for number, count in itertools.product(range(size.rounds), size.stored):
            found = kept.part(
                f"{count} stored, round {number}", lambda n=number, c=count: run(store, frozen, versions[:c], n, size)
            )
            runs[str(count)].append(found)
            say(f"round {number + 1}/{size.rounds}  {found['tokens_per_second']:8.1f} tokens/s  {count} stored")
        store.close()
    return {
        "what": f"bundled model; {size.rows} requests in flight, prefixes of {size.workload.virtual_tokens} virtual "
        f"tokens drawn by Zipf's law with s = 1, device memory for {size.on_device} of them; {size.rounds} runs",
        "levels": {count: _level(found, runs[str(size.resident)]) for count, found in runs.items()},
        "runs": runs,
        "goals": _goals(runs, str(size.resident), str(max(size.stored))),
    }


def publish(store: Store, frozen: FrozenModel, count: int, length: int) -> list[PrefixVersion]:
    """`count` prefixes that differ in every number. Several at a time, for each waits for the disk."""
    manifest = PrefixManifest(Method.PREFIX, frozen.geometry, length, position_offset=length, base_digest=frozen.digest)
    layers, two, heads, size = frozen.geometry.kv_shape

    def save(index: int) -> PrefixVersion:
        generator = torch.Generator().manual_seed(index)
        kv = torch.randn(layers, two, heads, length, size, generator=generator).to(torch.bfloat16)
        return store.prefixes.save(TENANT, f"p{index}", manifest, {"self.kv": kv})

    with ThreadPoolExecutor(PUBLISHERS) as pool:
        return list(pool.map(save, range(count)))


def run(
    store: Store, frozen: FrozenModel, versions: Sequence[PrefixVersion], number: int, size: Size
) -> dict[str, Any]:
    """One run over these prefixes, on a new engine with a new loader and a cold disk."""
    # Room for those prefixes beside rows with average prompts and the longest answers: what the rows leave is what lies
    # between them, in pieces.
    own = sum(size.workload.prompt_tokens) // 2 + 3 * size.workload.new_tokens // 2
    slots = size.on_device * size.workload.virtual_tokens + size.rows * own
    engine = engine_of(models.load(models.BUNDLED), slots=slots, rows=size.rows)
    loader = PrefixLoader(store.prefixes, frozen, size.host_bytes)
    seen: set[str] = set()
    if len(versions) == size.resident:
        seen.update(loader.load(version).payload.digest for version in versions)
    else:
        forget(store, versions)
    items = replace(size.workload, requests=size.requests).items(frozen.vocabulary_size, seed=number)
    requests = traffic.staggered(size.workload.requests_for(items, tenant=TENANT), seed=number)
    drawn = zipf(len(versions), len(requests), seed=number)

    def prepare(index: int, visit: Visit) -> GenerationRequest:
        version = store.prefixes.resolve(PrefixRef(TENANT, f"p{drawn[index]}"))
        visit.note = WARM if version.digest in seen else COLD
        seen.add(version.digest)
        bare = requests[index]
        return GenerationRequest(bare.id, bare.tenant, bare.prompt_ids, bare.params, loader.load(version).payload)

    def drive(loop: EngineLoop) -> tuple[list[Visit], EngineStats]:
        return traffic.closed(loop, len(requests), size.rows, prepare), loop.stats()

    visits, stats = beside(engine, drive)
    return _figures(visits[2 * size.rows :] or visits, stats.steps) | {
        "rate_of_all": round(traffic.rate(visits), 1),
        "loads": stats.prefix_misses,
        "evictions": stats.prefix_evictions,
        "resident": stats.prefixes_resident,
        "preemptions": stats.preemptions,
    }


def zipf(population: int, count: int, seed: int) -> list[int]:
    """Draws of 0 to population - 1 with probabilities as 1, 1/2, 1/3, …"""
    heights = list(itertools.accumulate(1 / (rank + 1) for rank in range(population)))
    draw = random.Random(seed)
    return [bisect_left(heights, draw.random() * heights[-1]) for _ in range(count)]


def forget(store: Store, versions: Sequence[PrefixVersion]) -> None:
    """Drops the prefixes' files from the system's cache."""
    for version in versions:
        with store.prefixes.file(version) as path, path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _figures(visits: Sequence[Visit], steps: int) -> dict[str, Any]:
    """Of the visits after the first ones, which all begin at once."""
    found: dict[str, Any] = {
        "tokens_per_second": round(traffic.rate(visits), 1),
        "steps": steps,
        "gap_ms": percentiles(traffic.gaps(visits), scale=1000),
    }
    cold, warm = ([visit for visit in visits if visit.note == note] for note in (COLD, WARM))
    for note, some in ((COLD, cold), (WARM, warm)):
        if some:
            first = percentiles([visit.first_token for visit in some], 50, 99, scale=1000)
            found[f"{note}_first_token_ms"] = first | {"requests": len(some)}
    if cold and warm:
        found["cold_adds_ms"] = percentiles(added(cold, warm), 50, 99, scale=1000)
    return found


def added(cold: Sequence[Visit], warm: Sequence[Visit]) -> list[float]:
    """What each cold prefix adds to its own first token: its reading, and a copy to the device within the engine.

    The wait in the engine varies far more with what else is in the step than by the copy, so medians are compared.
    """
    reading = statistics.median(visit.ready - visit.begun for visit in warm)
    copying = statistics.median(map(_in_engine, cold)) - statistics.median(map(_in_engine, warm))
    return [visit.ready - visit.begun - reading + max(0.0, copying) for visit in cold]


def _in_engine(visit: Visit) -> float:
    return visit.times[0] - visit.ready


def _level(runs: Sequence[dict[str, Any]], resident: Sequence[dict[str, Any]]) -> dict[str, Any]:
    rates = [found["tokens_per_second"] for found in runs]
    level: dict[str, Any] = {
        "tokens_per_second": sorted(rates)[len(rates) // 2],
        "of_all_resident": round(paired_ratio(rates, [found["tokens_per_second"] for found in resident]), 3),
        "gap_p99_ms": _median(runs, "gap_ms", "p99"),
    }
    if any("cold_adds_ms" in found for found in runs):
        level["cold_adds_p50_ms"] = _median(runs, "cold_adds_ms", "p50")
        level["cold_adds_p99_ms"] = _median(runs, "cold_adds_ms", "p99")
    return level


def _median(runs: Sequence[dict[str, Any]], name: str, percent: str) -> float:
    found = sorted(run[name][percent] for run in runs if name in run)
    return found[len(found) // 2]


def _goals(runs: dict[str, list[dict[str, Any]]], resident: str, most: str) -> dict[str, goals.Goal]:
    level, held_to = _level(runs[most], runs[resident]), _level(runs[resident], runs[resident])
    step = _median(runs[resident], "gap_ms", "p50")
    allowed = max(1.1 * held_to["gap_p99_ms"], held_to["gap_p99_ms"] + step)
    found = {
        f"throughput with {most} stored, of all resident": goals.at_least(level["of_all_resident"], 0.97),
        f"p99 between the others' tokens (all resident: {held_to['gap_p99_ms']:g} ms)": goals.at_most(
            level["gap_p99_ms"], round(allowed, 2), "ms"
        ),
    }
    if "cold_adds_p99_ms" in level:
        for percent in ("p50", "p99"):
            name = f"a cold prefix adds to its first token, {percent}"
            found[name] = goals.at_most(level[f"cold_adds_{percent}_ms"], 20, "ms")
    return found


def table(measured: dict[str, Any]) -> str:
    """One line a level, and the goals."""
    lines = ["| stored prefixes | tokens/s | of all resident | p99 between tokens | a cold one adds, p50 / p99 |"]
    lines.append("|---|---|---|---|---|")
    for count, level in measured["levels"].items():
        cold = "–"
        if "cold_adds_p50_ms" in level:
            cold = f"{level['cold_adds_p50_ms']:.1f} / {level['cold_adds_p99_ms']:.1f} ms"
        lines.append(
            f"| {int(count):,} | {level['tokens_per_second']:,.0f} | {level['of_all_resident']:.3f} "
            f"| {level['gap_p99_ms']:.1f} ms | {cold} |"
        )
    return "\n".join(lines)
