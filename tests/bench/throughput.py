"""Section `throughput`: workload W by this engine, by what a user would pick instead, and by the machine's limit."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from server.engine.engine import Engine
from tests.bench import agreement, goals, machine, peers, workload
from tests.bench.arms import BARE, CACHED, OURS, TEXT, TUNED, Antefix, Arm, Shots, cached, shots
from tests.bench.drive import Tokens, drain, dtype_name, engine_of
from tests.bench.progress import say
from tests.bench.results import Kept, paired_ratio
from tests.bench.shapes import GPT2_SMALL, LLAMA_150M, Shape, parameters
from tests.bench.workload import Item, W, Workload

SECTION = "throughput"
ORDER = (
    *(OURS, BARE, peers.SWITCHED, peers.GROUPED, peers.PADDED, peers.CONTINUOUS),
    *(TUNED, TEXT, CACHED),
)
# float32, bfloat16
GOALS = {
    peers.SWITCHED: (10, 12),
    peers.GROUPED: (8, 10),
    peers.PADDED: (2.1, 2.2),
    peers.CONTINUOUS: (2.1, 2.1),
    BARE: (0.95, 0.95),
    TEXT: (3, 3),
    CACHED: (3, 3),
}


@dataclass(frozen=True)
class Size:
    """How much of it. PEFT's rate does not depend on how many requests or adapters it gets one after another, so it
    gets the first few. Nor does continuous batching get all: on a CPU it takes the longer for a token the more requests
    there are. What takes all of W at once and is slow runs in some rounds only, each time beside one of ours.
    """

    shapes: tuple[Shape, ...] = (GPT2_SMALL, LLAMA_150M)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    workload: Workload = W
    rounds: int = 3
    switched: int = 2  # requests
    grouped: int = 2  # adapters
    continuous: int = 16  # requests
    bare_rounds: tuple[int, ...] = (0, 2)
    padded_rounds: tuple[int, ...] = (0, 2)  # in half precision the first of them
    continuous_rounds: tuple[int, ...] = (1,)
    text_rounds: tuple[int, ...] = (1,)
    text_tokens: int = 8 * 40
    text_in: tuple[tuple[Shape, torch.dtype], ...] = ((LLAMA_150M, torch.float32),)
    best_of: int = machine.BEST_OF
    slots: int = 32_768


@dataclass(frozen=True)
class Entry:
    """An arm, its part of the workload, the rounds it runs in, and the arm of ours that it is compared with."""

    arm: Arm
    items: Sequence[Item]
    rounds: Sequence[int]
    beside: str = OURS


def measure(kept: Kept, size: Size = Size()) -> dict[str, Any]:
    """All shapes in all dtypes, each a part of its own."""
    models = {}
    for shape in size.shapes:
        for dtype in size.dtypes:
            name = f"{shape.name}, {dtype_name(dtype)}"
            say(name)
            models[name] = kept.part(name, lambda shape=shape, dtype=dtype: Contest(shape, dtype, size).run())
            gc.collect()  # the next one's weights need the room
    return {
        "workload": "W: 64 greedy requests over 32 prefixes of 20 virtual tokens, prompts of 16-128 tokens, 64 new "
        "tokens each; random weights",
        "models": models,
        "goals": {
            f"{model}, against {name}": goals.at_least(ratio, GOALS[name]["bfloat16" in model], "×")
            for model, found in models.items()
            for name, ratio in found["ratios"].items()
            if name in GOALS
        },
    }


class Contest:
    """One model in one dtype: everybody loaded, then rounds in which they take turns."""

    def __init__(self, shape: Shape, dtype: torch.dtype, size: Size) -> None:
        self._shape, self._dtype, self._size = shape, dtype, size
        self._workload = size.workload
        self._items = size.workload.items(shape.vocabulary)
        self._rates: dict[str, list[float]] = {}
        self._beside: dict[str, list[float]] = {}
        self._tokens: dict[str, Tokens] = {}
        self._left_out: dict[str, str] = {}

    def run(self) -> dict[str, Any]:
        """What the rounds gave. Raises AssertionError where two that should say the same do not."""
        frozen = self._shape.frozen(self._dtype)
        geometry, count = frozen.geometry, parameters(frozen.model)
        limit = machine.limit(frozen.model, geometry, self._workload, self._items, best_of=self._size.best_of)
        say(f"  the machine's limit is {limit['tokens_per_second']:.0f} tokens/s")
        engine = engine_of(frozen, slots=self._size.slots, rows=self._workload.requests)
        payloads = workload.payloads(self._workload, geometry, self._dtype)
        peft = peers.PeftSwitched(peers.peft_model(self._shape, self._dtype, self._workload), self._workload)
        ours = Antefix(OURS, engine, self._workload, payloads)
        entries = [*self._with_prefixes(ours, peft), *self._without(engine)]
        if (self._shape, self._dtype) in self._size.text_in:
            entries += self._as_text(engine, ours)
        # every prefix comes to the device before the clock starts
        drain(engine, replace(self._workload, new_tokens=1).requests_for(self._items, payloads))
        checked = self._check_logits(engine, payloads, peft) if self._dtype is torch.bfloat16 else {}
        for number in range(self._size.rounds):
            self._round(number, entries)
            if self._dtype is torch.float32:
                checked = self._check_tokens(entries, peft)
        median = {name: round(statistics.median(rates), 1) for name, rates in self._rates.items()}
        return {
            "parameters": count,
            "tokens_per_second": {name: [round(rate, 2) for rate in found] for name, found in self._rates.items()},
            "median": median,
            "ratios": {
                name: round(paired_ratio(self._beside[name], rates), 3)
                for name, rates in self._rates.items()
                if self._beside[name]
            },
            "limit": limit | {"share": round(median[OURS] / limit["tokens_per_second"], 3)},
            "checked": checked,
            "left_out": self._left_out,
        }

    def _with_prefixes(self, ours: Antefix, peft: peers.PeftSwitched) -> list[Entry]:
        every, few = range(self._size.rounds), self._items[: self._size.switched]
        groups = [item for item in self._items if item.prefix < self._size.grouped]
        grouped = peers.PeftGrouped(peft.model, self._workload)
        return [Entry(ours, self._items, every), Entry(peft, few, every), Entry(grouped, groups, every)]

    def _without(self, engine: Engine) -> list[Entry]:
        plain = self._shape.model("sdpa", self._dtype)
        padded = self._size.padded_rounds[: None if self._dtype is torch.float32 else 1]
        found = [
            Entry(Antefix(BARE, engine, self._workload), self._items, self._size.bare_rounds),
            Entry(peers.PaddedGenerate(plain, self._workload), self._items, padded),
        ]
        few = self._items[: self._size.continuous]
        continuous = peers.ContinuousBatching(self._shape.model("sdpa", self._dtype), self._workload, few)
        if (reason := peers.why_not(continuous, few[0])) is None:
            return [*found, Entry(continuous, few, self._size.continuous_rounds)]
        say(f"  left out: {continuous.name}: {reason}")
        self._left_out[continuous.name] = reason
        return found

    def _as_text(self, engine: Engine, ours: Antefix) -> list[Entry]:
        """One request a task: after its tuned prefix, after its shots, and after its shots from a cache."""
        tasks = list({item.prefix: item for item in reversed(self._items)}.values())
        texts = shots(self._shape, self._workload.prefixes, self._size.text_tokens)
        kept = cached(self._shape.model("sdpa", self._dtype), texts)
        tuned = Antefix(TUNED, engine, self._workload, ours.payloads)
        # as the tuned prefixes, these are on the device before the clock starts
        drain(engine, replace(self._workload, new_tokens=1).requests_for(tasks, kept))
        rounds = self._size.text_rounds
        return [
            Entry(tuned, tasks, rounds, ""),
            Entry(Shots(engine, self._workload, texts), tasks, rounds, TUNED),
            Entry(Antefix(CACHED, engine, self._workload, kept), tasks, rounds, TUNED),
        ]

    def _round(self, number: int, entries: Sequence[Entry]) -> None:
        now: dict[str, float] = {}
        for entry in entries:
            if number not in entry.rounds:
                continue
            name = entry.arm.name
            begun = time.perf_counter()
            self._tokens[name] = entry.arm.run(entry.items)
            now[name] = len(entry.items) * self._workload.new_tokens / (time.perf_counter() - begun)
            self._rates.setdefault(name, []).append(now[name])
            beside = self._beside.setdefault(name, [])
            if entry.beside in now and entry.beside != name:
                beside.append(now[entry.beside])
            say(f"  round {number + 1}/{self._size.rounds}  {now[name]:8.1f} tokens/s  {name}")

    def _check_tokens(self, entries: Sequence[Entry], peft: peers.PeftSwitched) -> dict[str, Any]:
        checked: dict[str, Any] = {}
        ours = dict(zip(self._items, self._tokens[OURS], strict=True))
        for entry in entries:
            name = entry.arm.name
            if name in (peers.SWITCHED, peers.GROUPED):
                mine = [ours[item] for item in entry.items]
                ties = agreement.same_tokens(mine, self._tokens[name], entry.items, peft.next_logits)
                checked[name] = {"requests": len(mine), "differing only after a tie": ties}
        if CACHED in self._tokens:
            pairs = zip(self._tokens[CACHED], self._tokens[TEXT], strict=True)
            checked[CACHED] = {
                "requests": len(self._tokens[TEXT]),
                "with the text's tokens": sum(a == b for a, b in pairs),
            }
        return checked

    def _check_logits(self, engine: Engine, payloads: Sequence[Any], peft: peers.PeftSwitched) -> dict[str, Any]:
        """In half precision tokens part ways at every near tie, so logits are compared instead."""
        few = self._items[: self._size.switched]
        found = agreement.closeness(
            engine, self._workload, few, payloads, lambda item, done: peft.next_logits(item, done)
        )
        found.check()
        return {
            "logits, of the largest": round(found.worst, 4),
            "tolerance": agreement.BFLOAT16_TOLERANCE,
            "with a neighbour's prefix": round(found.control, 4),
        }


def table(measured: dict[str, Any]) -> str:
    """Every arm's rate, and how many times ours is that."""
    models = measured["models"]
    lines = [
        f"| on workload W: tokens/s, and how many times that antefix is | {' | '.join(models)} |",
        "|---" * (1 + len(models)) + "|",
    ]
    named = {name for found in models.values() for name in (*found["median"], *found.get("left_out", ()))}
    for name in (name for name in ORDER if name in named):
        lines.append(f"| {name} | {' | '.join(_cell(found, name) for found in models.values())} |")
    if any("limit" in found for found in models.values()):
        shares = [_share(found) for found in models.values()]
        lines.append(f"| the machine's limit, and our share of it | {' | '.join(shares)} |")
    return "\n".join(lines)


def _cell(found: dict[str, Any], name: str) -> str:
    if name in found.get("left_out", ()):
        return "does not run here"
    if name not in found["median"]:
        return ""
    ratio = f" ({found['ratios'][name]:.2f}×)" if name in found["ratios"] else ""
    return f"{found['median'][name]:.0f}{ratio}"


def _share(found: dict[str, Any]) -> str:
    limit = found.get("limit")
    return f"{limit['tokens_per_second']:.0f} ({limit['share']:.0%})" if limit else ""
