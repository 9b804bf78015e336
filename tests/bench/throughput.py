"""Section `throughput`: workload W by this engine, by PEFT request by request, and by a padded transformers batch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from tests.bench import results
from tests.bench.arms import Antefix, Arm, PaddedGenerate, PeftSwitched, Tokens, next_logits
from tests.bench.workload import NEW_TOKENS, Item, items

SECTION = "throughput"
REPETITIONS = 3
# PEFT serves one request at a time, so its tokens per second do not depend on how many there are.
PEFT_REQUESTS = 8
# Two float32 sums in another order may swap tokens this close; farther apart, a difference is an error.
TIE = 1e-4


def run() -> dict[str, Any]:
    """Measures all arms alternately and writes the results; a repetition fails unless our tokens are PEFT's."""
    requests = items()
    few = requests[:PEFT_REQUESTS]
    ours, bare, peft, padded = Antefix(), Antefix(prefixed=False), PeftSwitched(), PaddedGenerate()
    plan: list[tuple[Arm, Sequence[Item]]] = [(ours, requests), (peft, few), (padded, requests), (bare, requests)]
    rates: dict[str, list[float]] = {arm.name: [] for arm, _ in plan}
    tokens: dict[str, Tokens] = {}
    for repetition in range(REPETITIONS):
        for arm, work in plan:
            begun = time.perf_counter()
            tokens[arm.name] = arm.run(work)
            rates[arm.name].append(len(work) * NEW_TOKENS / (time.perf_counter() - begun))
            print(
                f"repetition {repetition + 1}/{REPETITIONS}  {rates[arm.name][-1]:8.1f} tokens/s  {arm.name}",
                flush=True,
            )
        ties = same_tokens(tokens[ours.name][:PEFT_REQUESTS], tokens[peft.name], few, peft)
    measured = {
        "workload": "W: GPT-2-small shape, random float32 weights, 64 requests over 32 prefixes of 20 virtual tokens, "
        "prompts of 16-128 tokens, 64 new tokens each, greedy",
        "tokens_per_second": {name: [round(rate, 2) for rate in found] for name, found in rates.items()},
        "median": {name: round(statistics.median(found), 1) for name, found in rates.items()},
        "ratios": {
            "against PEFT switched per request": round(results.paired_ratio(rates[ours.name], rates[peft.name]), 2),
            "against transformers generate": round(results.paired_ratio(rates[ours.name], rates[padded.name]), 2),
            "against this engine without prefixes": round(results.paired_ratio(rates[ours.name], rates[bare.name]), 3),
        },
        "goals": {"against PEFT switched per request": 8.0, "against transformers generate": 1.5},
        "peft_requests": PEFT_REQUESTS,
        "checked": {"requests with PEFT's tokens": PEFT_REQUESTS - ties, "differing only after a tie": ties},
    }
    results.write(SECTION, measured)
    return measured


def same_tokens(ours: Tokens, theirs: Tokens, requests: Sequence[Item], peft: PeftSwitched) -> int:
    """How many requests differ, each only after a tie of the two best logits. Raises AssertionError on any other."""
    ties = 0
    for mine, reference, item in zip(ours, theirs, requests, strict=True):
        if mine == reference:
            continue
        first = next(i for i, pair in enumerate(zip(mine, reference, strict=True)) if pair[0] != pair[1])
        best = torch.topk(next_logits(peft, item, reference[:first]), 2).values
        assert float(best[0] - best[1]) < TIE, f"token {first} differs from PEFT's and is no tie"
        ties += 1
    return ties


def table(measured: dict[str, Any]) -> str:
    """The section as the README shows it."""
    lines = ["| on workload W | tokens/s (median of 3 runs) | antefix is |", "|---|---|---|"]
    ours = "antefix, mixed prefixes"
    against = dict(zip(list(measured["median"])[1:], measured["ratios"].values(), strict=True))
    for name, rate in measured["median"].items():
        lines.append(f"| {name} | {rate:.0f} | {'' if name == ours else f'{against[name]:.2f}×'} |")
    return "\n".join(lines)
