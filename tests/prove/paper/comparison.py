"""The comparison of Li & Liang (2021): every way to teach the bundled model a task, on E2E and WebNLG.

Every arm has the same rows, steps and looks at the dev rows; the learning rate is the best of three by dev loss, then
three seeds are scored on the same 200 inputs. Two arms run at a time; every run is kept in `docs/results`. What an arm
costs is measured at the very end, in short runs one after another, which should have the machine to themselves.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.bench import plots, results
from tests.prove.arms import Runs, abreast, at_best_rate
from tests.prove.bundled import load
from tests.prove.paper import baselines
from tests.prove.paper.runs import RATES, VIRTUAL_TOKENS
from tests.prove.paper.tasks import Task

SECTION = "paper"
COST_STEPS = 40
COSTS = ("epoch_seconds", "peak_mb", "tokens_per_second")
Run = Callable[..., dict[str, Any]]  # of a task, an arm, a learning rate, a seed, steps
Arm = Callable[..., dict[str, Any]]  # of a `Run`, and what it is called
STEPS, FEW_STEPS, SEEDS, FEW_SEEDS = 500, 200, (0, 1, 2), (0, 1)  # 500 are all rows once
TASKS = (Task("e2e"), Task("webnlg"))
FEW = tuple(Task("e2e", few) for few in (50, 100, 200, 500))
UNSEEN = Task("webnlg", unseen=True)
FEW_ARMS = ("fine-tuning", "PEFT prefix", "prefix")
UNSEEN_ARMS = ("fine-tuning", "adapters 3 %", "adapters 0.1 %", "prefix")
WRITTEN = ("instruction", "shots 1", "shots 4", "shots 8")
LENGTHS = (1, 5, 10, 20, 48, 96)
# Name: the arm, and what is different about it. Every one is asked where attention goes.
ABLATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"{arm}, {length} virtual tokens": (arm, {"virtual_tokens": length})
        for arm in ("prefix", "prefix_mlp", "prompt")
        for length in LENGTHS
    },
    "prefix, 20, random tokens": ("prefix", {"virtual_tokens": 20, "init": "random_tokens"}),
    "prefix, 20, first token tuned": ("prefix", {"virtual_tokens": 20, "frozen_tokens": 0}),
    "prefix_mlp, 20, random tokens": ("prefix_mlp", {"virtual_tokens": 20, "init": "random_tokens"}),
    "prefix_plus": ("prefix_plus", {}),
    "prefix_plus, gelu": ("prefix_plus", {"feature_map": "gelu"}),
}
COLUMNS = (
    "BLEU", "ROUGE-L", "chrF", "dev loss", "trainable", "KB a task", "s an epoch", "peak MB", "tokens/s written"
)  # fmt: skip


def arms() -> dict[str, tuple[float, ...]]:
    """Every trained arm and the learning rates that are tried for it."""
    return {name: arm.rates for name, arm in baselines.baselines(VIRTUAL_TOKENS).items()} | RATES


def run() -> dict[str, Any]:
    """Everything, or what is not there yet."""
    runs = Runs(results.FOLDER / "paper-runs.jsonl", "tests.prove.paper.runs")
    base = load()

    def of(task: Task, arm: str, rate: float, seed: int, steps: int, **more: Any) -> dict[str, Any]:
        what = {"task": vars(task), "arm": arm, "rate": rate, "seed": seed, "steps": steps, **more}
        return runs.of({"model": base.digest, **what})

    plan = [(task, name, STEPS) for task in TASKS for name in arms()]
    plan += [(task, name, FEW_STEPS) for task in FEW for name in FEW_ARMS]
    plan += [(UNSEEN, name, STEPS) for name in UNSEEN_ARMS]
    written, every = list(itertools.product(TASKS, WRITTEN)), (*WRITTEN, *arms())
    found: dict[str, Any] = {task.label: {} for task in (*TASKS, *FEW, UNSEEN)}
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as bar:
        shown = bar.add_task(SECTION, total=len(written) + len(plan) + len(ABLATIONS) + len(every))

        def shown_as(work: Arm, *names: Any) -> dict[str, Any]:
            made = work(of, *names)
            bar.update(shown, advance=1, description=" ".join(str(getattr(name, "label", name)) for name in names))
            return made

        def both(work: Arm, names: Sequence[tuple[Any, ...]]) -> list[dict[str, Any]]:
            return abreast([functools.partial(shown_as, work, *name) for name in names])

        for (task, name), arm in zip(written, both(_written, written), strict=True):
            found[task.label][name] = arm
        for (task, name, _), arm in zip(plan, both(_arm, plan), strict=True):
            found[task.label][name] = arm
        first = found[TASKS[0].label]
        tuned = {name: first[name]["rate"] for name in arms()}
        ablations = both(_ablation, [(name, tuned[arm]) for name, (arm, _) in ABLATIONS.items()])
        for name in every:
            first[name] |= shown_as(_cost, name)
    parameters = sum(p.numel() for p in base.model.parameters())
    return {"parameters": parameters, "tasks": found, "ablations": dict(zip(ABLATIONS, ablations, strict=True))}


def missed(measured: dict[str, Any]) -> list[str]:
    """The goals that were not reached, beyond what the seeds scatter."""
    lines = []
    for task in TASKS:
        found = measured["tasks"][task.label]
        ours = max((found[name] for name in ("prefix", "prefix_mlp")), key=lambda arm: arm["bleu"])
        peft = max((found[name] for name in ("PEFT prefix", "PEFT prefix, MLP")), key=lambda arm: arm["bleu"])
        if ours["bleu"] + _error(ours, peft) < peft["bleu"]:
            lines.append(f"{task.label}: prefix at least PEFT's")
        plus, lora = found["prefix_plus"], found["LoRA"]
        if plus["bleu"] + _error(plus, lora) < 0.98 * lora["bleu"]:
            lines.append(f"{task.label}: prefix_plus at least 0.98 of LoRA")
    unseen = measured["tasks"][UNSEEN.label]
    if unseen["prefix"]["bleu"] <= unseen["fine-tuning"]["bleu"]:
        lines.append("prefix above fine-tuning on unseen topics")
    return lines


def table(measured: dict[str, Any]) -> str:
    """One table a task, and one of the ablations; means over seeds, and what they scatter."""
    found = {**measured["tasks"], f"{TASKS[0].label}, {FEW_STEPS} steps": measured["ablations"]}
    return "\n\n".join(_table(name, arms_of, measured["parameters"]) for name, arms_of in found.items())


def plot(measured: dict[str, Any]) -> None:
    """`docs/results/paper.svg`: dev loss against length, and the weight of the prefix against the prompt's length."""
    found = measured["ablations"]
    lengths = {
        arm: (LENGTHS, [found[f"{arm}, {length} virtual tokens"]["loss"] for length in LENGTHS])
        for arm in ("prefix", "prefix_mlp", "prompt")
    }
    others = {
        name: (LENGTHS[:1] + LENGTHS[-1:], [found[name]["loss"]] * 2)
        for name, (arm, options) in ABLATIONS.items()
        if "virtual_tokens" not in options or len(options) > 1
    }
    names = [f"prefix, {length} virtual tokens" for length in LENGTHS] + ["prefix_plus"]
    weights = {name: ([int(x) for x in found[name]["weight"]], list(found[name]["weight"].values())) for name in names}
    plots.draw(
        "paper.svg",
        [
            plots.Panel("virtual tokens", "dev loss, nats a token", {**lengths, **others}, logarithmic=True),
            plots.Panel("tokens of the prompt", "weight of the prefix at the last", weights, logarithmic=True),
        ],
    )


def mean(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What runs of several seeds have in common, but for costs: means, and the standard error of BLEU."""
    kinds = {name: type(value) for name, value in runs[0].items() if name not in COSTS}
    numbers = [name for name, kind in kinds.items() if kind in (int, float)]
    found = {name: statistics.fmean(run[name] for run in runs) for name in numbers}
    spread = statistics.stdev(run["bleu"] for run in runs) if len(runs) > 1 else 0.0
    kept = {name: runs[0][name] for name in ("samples", "weight") if name in runs[0]}
    return {**found, "bleu_error": spread / len(runs) ** 0.5, "seeds": len(runs), **kept}


def _written(of: Run, task: Task, name: str) -> dict[str, Any]:
    return mean([of(task, name, 0.0, seed, 0) for seed in (SEEDS if name.startswith("shots") else SEEDS[:1])])


def _arm(of: Run, task: Task, name: str, steps: int) -> dict[str, Any]:
    return mean(at_best_rate(lambda rate, seed: of(task, name, rate, seed, steps), arms()[name], SEEDS))


def _ablation(of: Run, name: str, rate: float) -> dict[str, Any]:
    """At the learning rate that is best for the arm itself."""
    arm, options = ABLATIONS[name]
    return mean([of(TASKS[0], arm, rate, seed, FEW_STEPS, options=options) for seed in FEW_SEEDS])


def _cost(of: Run, name: str) -> dict[str, Any]:
    found = of(TASKS[0], name, arms().get(name, (0.0,))[0], 0, COST_STEPS, cost=True)
    return {name: found[name] for name in COSTS if name in found}


def _error(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The standard error of the difference of two means."""
    return float((one["bleu_error"] ** 2 + other["bleu_error"] ** 2) ** 0.5)


def _table(task: str, found: dict[str, Any], parameters: int) -> str:
    lines = [f"| {' | '.join((task, *COLUMNS))} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, arm in found.items():
        cells = [
            name,
            f"{arm['bleu']:.1f} ± {arm['bleu_error']:.1f}",
            f"{arm['rouge_l']:.1f}",
            f"{arm['chrf']:.1f}",
            f"{arm['loss']:.3f}" if "loss" in arm else "",
            f"{100 * arm['trainable'] / parameters:.2f} %",
            f"{arm['bytes'] / 1000:,.1f}",
            f"{arm['epoch_seconds']:.0f}" if "epoch_seconds" in arm else "",
            f"{arm['peak_mb']:.0f}" if "peak_mb" in arm else "",
            f"{arm['tokens_per_second']:.0f}" if "tokens_per_second" in arm else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
