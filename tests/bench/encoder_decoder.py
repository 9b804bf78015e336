"""Section `encoder_decoder`: prefixes in three stacks of BART, by this engine and by what a user would pick instead."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from prefix_store.geometry import Stack
from prefix_store.model import sites
from prefix_store.model.frozen import FrozenModel
from server.engine.engine import Engine
from server.scheduler.messages import GenerationRequest, PrefixPayload
from tests.bench import agreement, encoder_decoder_peers, goals, machine
from tests.bench.arms import BARE, OURS, Arm
from tests.bench.drive import Tokens, drain, engine_of
from tests.bench.encoder_decoder_peers import CONCATENATED, Concatenated, PaddedGenerate, PeftSwitched
from tests.bench.peers import PADDED, SWITCHED
from tests.bench.progress import say
from tests.bench.results import Kept, paired_ratio
from tests.bench.shapes import BART_BASE, Shape, parameters
from tests.bench.workload import Item, Workload, stack_prefixes

SECTION = "encoder_decoder"
ORDER = (OURS, BARE, SWITCHED, CONCATENATED, PADDED)
# 32 greedy requests over 16 prefixes of 20 virtual tokens, sources of 256 tokens, 64 new tokens.
SUMMARIES = Workload(32, 16, 20, (256, 256), 64)
GOALS = {SWITCHED: 5, CONCATENATED: 5, PADDED: 1.3}


@dataclass(frozen=True)
class Size:
    """How much of it. Who serves one request at a time gets the first few: its rate does not depend on how many."""

    shape: Shape = BART_BASE
    workload: Workload = SUMMARIES
    rounds: int = 3
    switched: int = 3
    best_of: int = machine.BEST_OF
    slots: int = 32_768


class Served:
    """This engine, all requests submitted at once; without payloads it serves the bare model."""

    def __init__(
        self, name: str, engine: Engine, workload: Workload, payloads: Sequence[PrefixPayload] | None = None
    ) -> None:
        self.name = name
        self._engine, self._workload, self._payloads = engine, workload, payloads

    def run(self, items: Sequence[Item]) -> Tokens:
        start, params = (self._engine.frozen.start_id,), self._workload.params()
        return drain(
            self._engine,
            [
                GenerationRequest(
                    str(index),
                    "",
                    start,
                    params,
                    self._payloads[item.prefix] if self._payloads else None,
                    source_ids=item.prompt,
                )
                for index, item in enumerate(items)
            ],
        )


def measure(kept: Kept, size: Size = Size()) -> dict[str, Any]:
    """All arms in turn, as one part."""
    found = kept.part(size.shape.name, lambda: Contest(size).run())
    return {
        "workload": "32 greedy requests over 16 prefixes of 20 virtual tokens in three stacks, sources of 256 tokens, "
        "64 new tokens each; random weights, float32",
        "model": size.shape.name,
        **found,
        "goals": {
            f"against {name}": goals.at_least(ratio, GOALS[name], "×")
            for name, ratio in found["ratios"].items()
            if name in GOALS
        },
    }


class Contest:
    """Everybody loaded, then rounds in which they take turns. No round counts before its tokens have been compared."""

    def __init__(self, size: Size) -> None:
        self._size, self._workload = size, size.workload
        self._items = size.workload.items(size.shape.vocabulary)
        self._few = self._items[: size.switched]

    def run(self) -> dict[str, Any]:
        """What the rounds gave. Raises AssertionError where two that should say the same do not."""
        size, workload = self._size, self._workload
        frozen = size.shape.frozen()
        count, limit = parameters(frozen.model), self._limit(frozen)
        say(f"  the machine's limit is {limit['tokens_per_second']:.0f} tokens/s")
        prefixes = stack_prefixes(workload, frozen.geometry)
        payloads = [_payload(str(index), kvs) for index, kvs in enumerate(prefixes)]
        peft = PeftSwitched(size.shape, workload, prefixes)
        plain = size.shape.model("sdpa")
        engine = engine_of(frozen, slots=size.slots, rows=workload.requests)
        ours, bare = Served(OURS, engine, workload, payloads), Served(BARE, engine, workload)
        concatenated, without = (Concatenated(plain, workload, kvs) for kvs in (prefixes, None))
        padded = PaddedGenerate(size.shape.model("sdpa"), workload)
        # every prefix comes to the device before the clock starts
        Served(OURS, engine, replace(workload, new_tokens=1), payloads).run(self._items)
        checked = {SWITCHED: self._check_peft(peft, engine, plain)}
        arms: list[tuple[Arm, Sequence[Item]]] = [(arm, self._few) for arm in (peft, concatenated)]
        arms += [(arm, self._items) for arm in (ours, padded, bare)]
        rates: dict[str, list[float]] = {arm.name: [] for arm, _ in arms}
        for number in range(size.rounds):
            tokens, now = {}, {}
            for arm, items in arms:
                begun = time.perf_counter()
                tokens[arm.name] = arm.run(items)
                now[arm.name] = len(items) * workload.new_tokens / (time.perf_counter() - begun)
                say(f"  round {number + 1}/{size.rounds}  {now[arm.name]:8.1f} tokens/s  {arm.name}")
            checked[CONCATENATED] = self._check(tokens[OURS], tokens[CONCATENATED], self._few, concatenated)
            checked[PADDED] = self._check(tokens[BARE], tokens[PADDED], self._items, without)
            for name, rate in now.items():
                rates[name].append(rate)
        median = {name: round(statistics.median(found), 1) for name, found in rates.items()}
        return {
            "parameters": count,
            "tokens_per_second": {name: [round(rate, 2) for rate in found] for name, found in rates.items()},
            "median": median,
            "ratios": {
                name: round(paired_ratio(rates[OURS], found), 3) for name, found in rates.items() if name != OURS
            },
            "limit": limit | {"share": round(median[OURS] / limit["tokens_per_second"], 3)},
            "checked": checked,
        }

    def _check(self, ours: Tokens, theirs: Tokens, items: Sequence[Item], reference: Concatenated) -> dict[str, int]:
        ties = agreement.same_tokens(ours[: len(items)], theirs, items, reference.next_logits)
        return {"requests": len(items), "differing only after a tie": ties}

    def _check_peft(self, peft: PeftSwitched, engine: Engine, plain: Any) -> dict[str, int]:
        """PEFT has no other stack than the decoder's, so it is compared with what these alone make here."""
        kvs = [{Stack.SELF: kv} for kv in peft.read()]
        payloads = [_payload(f"decoder's {index}", kv) for index, kv in enumerate(kvs)]
        mine = Served(OURS, engine, self._workload, payloads).run(self._few)
        reference = Concatenated(plain, self._workload, kvs)
        return self._check(mine, peft.run(self._few), self._few, reference)

    def _limit(self, frozen: FrozenModel) -> dict[str, float]:
        """New tokens per second if nothing were done but multiply by all weights, each at its best rate."""
        encoder, model, rows = frozen.model.get_encoder(), frozen.model, len(self._items)
        linear = [layer for layer in model.modules() if type(layer) is torch.nn.Linear]
        within = set(encoder.modules())
        crossing = [m for m in model.modules() if sites.stack_of(m) is Stack.CROSS]
        of_sources = within | {layer for m in crossing for layer in (m.k_proj, m.v_proj)}
        reading = [layer for layer in linear if layer in of_sources]
        writing = [layer for layer in linear if layer not in of_sources]
        sources = sum(len(item.prompt) for item in self._items) / machine.PROMPT_TOKENS
        best_of = self._size.best_of
        encode = sources * machine.product_seconds(reading, machine.PROMPT_TOKENS, max(1, best_of // 4))
        decode = self._workload.new_tokens * machine.product_seconds(writing, rows, best_of)
        return {
            "sources_seconds": round(encode, 3),
            "answers_seconds": round(decode, 3),
            "tokens_per_second": round(rows * self._workload.new_tokens / (encode + decode), 1),
        }


def _payload(digest: str, kvs: encoder_decoder_peers.Stacks) -> PrefixPayload:
    """Canonical KV `[L, 2, H, P, D]` by stack, as the engine takes it; the decoder begins behind its own."""
    length = kvs[Stack.SELF].shape[3]
    return PrefixPayload(
        digest,
        length,
        length,
        slides=True,
        tensor=kvs[Stack.SELF],
        stacks=tuple(kvs),
        cross=kvs.get(Stack.CROSS),
        encoder=kvs.get(Stack.ENCODER),
    )


def table(measured: dict[str, Any]) -> str:
    """Every arm's rate, and how many times ours is that."""
    ratios, limit = measured["ratios"], measured["limit"]
    lines = [
        f"| {measured['model']}: 32 sources of 256 tokens, 64 new tokens each | tokens/s | antefix is |",
        "|---|---|---|",
    ]
    for name in ORDER:
        ratio = f"{ratios[name]:.2f}×" if name in ratios else ""
        lines.append(f"| {name} | {measured['median'][name]:.0f} | {ratio} |")
    share = f"{limit['tokens_per_second']:.0f} | {limit['share']:.0%}"
    lines.append(f"| the machine's limit by products alone, and our share of it | {share} |")
    return "\n".join(lines)
