"""Section `training`: steps of prefix tuning beside PEFT's and beside full fine-tuning, their rate and memory."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tests.bench import goals, training_memory
from tests.bench.progress import say
from tests.bench.results import Kept, paired_ratio
from tests.bench.shapes import GPT2_SMALL, Shape
from tests.bench.training_arms import ARMS, FULL, HALF, OURS, PEFT, Arm, Ours, Setup
from tests.bench.training_work import batch
from trainer.data import Example

SECTION = "training"
# Largest difference of two arms' losses, in nats a token, at any step. Observed: 3e-6 and 3e-4.
TOLERANCES = {PEFT: 1e-4, HALF: 0.02}
ONE, HALF_COUNT = "one job", "one job, where half the tokens are prompts"
SHORT, LONG = "users together, short examples", "users together"


@dataclass(frozen=True)
class Size:
    """How much of it. `shortest` to `short`: tokens of the short examples, one a user."""

    shape: Shape = GPT2_SMALL
    virtual_tokens: int = 10
    rows: int = 8
    tokens: int = 128
    users: int = 8
    shortest: int = 24
    short: int = 48
    rounds: int = 4
    together_rounds: int = 4
    learning_rate: float = 1e-2

    def setup(self, users: int) -> Setup:
        """For so many users."""
        return Setup(self.shape, self.virtual_tokens, users, self.learning_rate)


Batches = Sequence[Sequence[Example]]


def measure(kept: Kept, size: Size = Size()) -> dict[str, Any]:
    """One job by four arms, users together against one by one, and the memory of two arms."""
    work = {
        "numbers": dict(size.shape.numbers), "virtual_tokens": size.virtual_tokens, "rows": size.rows,
        "tokens": size.tokens, "threads": torch.get_num_threads(),
    }  # fmt: skip
    memory = {arm: kept.part(f"memory of {arm}", lambda a=arm: training_memory.measure(a, work)) for arm in ARMS}
    say(f"memory: {memory}")
    one = kept.part(ONE, lambda: one_job(size, (OURS, PEFT, HALF, FULL)))
    prompts = kept.part(HALF_COUNT, lambda: one_job(size, (OURS, PEFT), prompt=size.tokens // 2))
    short, long = (kept.part(name, lambda n=name: together(size, n)) for name in (SHORT, LONG))
    ours, full = memory[OURS], memory[FULL]
    return {
        "what": f"{size.shape.name}, random weights, {size.virtual_tokens} virtual tokens, AdamW, no dropout; "
        "float32 unless named; every token counts, but where said",
        "jobs": {ONE: one, HALF_COUNT: prompts, SHORT: short, LONG: long},
        "memory": memory,
        "goals": {
            f"one job, {size.rows} × {size.tokens} tokens: PEFT": goals.at_least(one["ratios"][PEFT], 1.3, "×"),
            "one job, where half the tokens are prompts: PEFT": goals.at_least(prompts["ratios"][PEFT], 1.3, "×"),
            "one job: bfloat16, to our float32": goals.at_least(1 / one["ratios"][HALF], 1.5, "×"),
            "one job: full fine-tuning": goals.at_least(one["ratios"][FULL], 1.8, "×"),
            f"{size.users} users, up to {size.short} tokens each: PEFT one by one": goals.at_least(
                short["ratios"][PEFT], 1.5, "×"
            ),
            f"{size.users} users, {size.tokens} tokens each: PEFT one by one": goals.at_least(
                long["ratios"][PEFT], 1.2, "×"
            ),
            "training state, of full fine-tuning's": goals.at_most(ours["state_bytes"] / full["state_bytes"], 1 / 500),
            "peak memory, of full fine-tuning's": goals.at_most(ours["peak_bytes"] / full["peak_bytes"], 0.6),
        },
    }


def one_job(size: Size, names: Sequence[str], prompt: int = 1) -> dict[str, Any]:
    """One user's steps; every arm sees the same batches from the same start."""
    arms = {name: ARMS[name](size.setup(1)) for name in names}
    batches = [
        [batch(size.shape.vocabulary, size.rows, size.tokens, seed, prompt=prompt)] for seed in range(1 + size.rounds)
    ]
    ours = arms[OURS]
    assert isinstance(ours, Ours)
    (bare,) = ours.losses(batches[0], [None])
    (wrong,) = ours.losses(batches[0], [size.setup(1).start_kv(ours.frozen.geometry, 1)])
    return _rounds(arms, batches, bare, [wrong])


def together(size: Size, name: str) -> dict[str, Any]:
    """A step of every user, each with one example of his own."""
    arms = {arm: ARMS[arm](size.setup(size.users)) for arm in (OURS, PEFT)}
    shortest, tokens = (size.shortest, size.short) if name == SHORT else (size.tokens, size.tokens)
    batches = [
        [batch(size.shape.vocabulary, 1, tokens, 1000 * number + user, shortest=shortest) for user in range(size.users)]
        for number in range(1 + size.together_rounds)
    ]
    ours = arms[OURS]
    assert isinstance(ours, Ours)
    wrong = ours.losses(batches[0], [*ours.tuned[1:], ours.tuned[0]])
    return _rounds(arms, batches, math.nan, wrong)


def _rounds(arms: dict[str, Arm], batches: Sequence[Batches], bare: float, wrong: list[float]) -> dict[str, Any]:
    """Alternating steps; the first is not timed, and none counts unless the losses agree."""
    losses: dict[str, list[list[float]]] = {name: [] for name in arms}
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for number, found in enumerate(batches):
        tokens = sum(len(example.ids) for examples in found for example in examples)
        for name, arm in arms.items():
            begun = time.perf_counter()
            losses[name].append(arm.step(found))
            if number:
                rates[name].append(tokens / (time.perf_counter() - begun))
        if number:
            say(f"  round {number}: " + ", ".join(f"{name} {rate[-1]:.0f}" for name, rate in rates.items()))
    checked = {name: apart(losses[OURS], losses[name]) for name in arms if name in TOLERANCES}
    for name, difference in checked.items():
        assert difference < TOLERANCES[name], f"{name}: losses differ by {difference:.1e}"
    if FULL in arms:
        assert abs(bare - losses[FULL][0][0]) < TOLERANCES[PEFT], "full fine-tuning began from another model"
    control = apart([wrong], losses[OURS][:1])
    assert control > 5 * TOLERANCES[PEFT], "another prefix would have passed for the right one"
    return {
        "tokens_per_second": {name: [round(rate, 1) for rate in found] for name, found in rates.items()},
        "median": {name: round(statistics.median(found), 1) for name, found in rates.items()},
        "ratios": {name: round(paired_ratio(rates[OURS], rates[name]), 3) for name in arms if name != OURS},
        "losses": {name: [round(found[0], 4) for found in losses[name]] for name in arms},
        "largest_difference_of_losses": checked,
        "with_another_prefix": control,
    }


def apart(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """The largest difference of any loss."""
    return max(abs(mine - other) for a, b in zip(ours, theirs, strict=True) for mine, other in zip(a, b, strict=True))


def table(measured: dict[str, Any]) -> str:
    """Tokens a second by arm, the memory, and the goals."""
    memory, jobs = measured["memory"], measured["jobs"]
    lines = [
        f"| {measured['what']} | tokens/s, {' | tokens/s, '.join(jobs)} | peak memory, MB | training state, MB |",
        "|---" * (3 + len(jobs)) + "|",
    ]
    for name in ARMS:
        rates = [_rate(job, name) for job in jobs.values()]
        held = memory[name]
        lines.append(
            f"| {name} | {' | '.join(rates)} | {held['peak_bytes'] / 1e6:,.0f} | {held['state_bytes'] / 1e6:,.1f} |"
        )
    return "\n".join(lines) + "\n\n" + goals.table("antefix, float32, against", measured["goals"])


def _rate(job: dict[str, Any], name: str) -> str:
    if name not in job["median"]:
        return ""
    ratio = f" ({job['ratios'][name]:.2f}×)" if name in job["ratios"] else ""
    return f"{job['median'][name]:,.0f}{ratio}"
