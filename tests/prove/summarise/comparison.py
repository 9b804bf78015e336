"""The paper's second system: a BART that sums up, with prefixes on every attention, on some of them, and its rivals.

A small BART is pretrained first (`pretrain.py`). Every arm has the same rows, steps and looks at the dev rows; the
learning rate is the best of three by dev loss, then two seeds are scored. Two arms run at a time, each with one thread;
every run is kept in `docs/results`.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from prefix_store.model import frozen
from tests.bench import results
from tests.prove.arms import Runs, abreast, at_best_rate
from tests.prove.paper.baselines import BATCH
from tests.prove.summarise import answers, pretrain, runs, tasks
from tests.prove.summarise.rivals import rivals

SECTION = "summarise"
STEPS, SEEDS = 300, (0, 1)
COLUMNS = ("ROUGE-1", "ROUGE-2", "ROUGE-L", "dev loss", "trainable", "KB a task", "CPU s of training")


def arms() -> dict[str, tuple[float, ...]]:
    """Every arm, those that learn nothing first, and the learning rates that are tried for it."""
    ours = {name: rates for name, (_, rates) in runs.OURS.items()}
    theirs = {name: rival.rates for name, rival in rivals(runs.VIRTUAL_TOKENS).items()}
    return {runs.INPUT: (), runs.UNTUNED: (), **theirs, **ours}


def run() -> dict[str, Any]:
    """Everything, or what is not there yet."""
    model = pretrain.finished()
    made = Runs(results.FOLDER / f"{SECTION}-runs.jsonl", "tests.prove.summarise.runs", str(model))
    digest = frozen.digest_of(model)
    plan = [(task, arm) for task in tasks.NAMES for arm in arms()]
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as bar:
        shown = bar.add_task(SECTION, total=len(plan))

        def work(task: str, arm: str) -> dict[str, Any]:
            found = _arm(made, {"model": digest, "task": task, "arm": arm})
            bar.update(shown, advance=1, description=f"{task}: {arm}")
            return found

        arms_of = abreast([functools.partial(work, *names) for names in plan])
    found: dict[str, Any] = {task: {} for task in tasks.NAMES}
    for (task, arm), result in zip(plan, arms_of, strict=True):
        found[task][arm] = result
    return {
        "parameters": frozen.load(model).model.num_parameters(),
        "pretraining": {"steps": pretrain.STEPS, "tokens": pretrain.STEPS * pretrain.Recipe().batch_tokens},
        "tasks": found,
    }


def missed(measured: dict[str, Any]) -> list[str]:
    """What did not finish, and where a prefix on every attention is no better than nothing."""
    lines = []
    for task in tasks.NAMES:
        found = measured["tasks"].get(task, {})
        absent = [arm for arm in arms() if arm not in found]
        lines += [f"{task}: {arm} finished" for arm in absent]
        if not absent and found["prefix"]["rougeL"] <= found[runs.UNTUNED]["rougeL"]:
            lines.append(f"{task}: prefix above the untuned model by ROUGE-L")
    return lines


def table(measured: dict[str, Any]) -> str:
    """How it was made, and one table a task: means over seeds, and what ROUGE-L scatters."""
    done = measured["pretraining"]
    made = (
        f"A BART of {measured['parameters']:,} parameters, pretrained in {done['steps']:,} steps on "
        f"{done['tokens'] / 1e6:.0f} million tokens; {STEPS} steps of {BATCH} rows an arm, {len(SEEDS)} seeds, "
        f"prefixes of {runs.VIRTUAL_TOKENS} virtual tokens; {answers.BEAMS} beams, length penalty "
        f"{answers.LENGTH_PENALTY}; ROUGE is F with stems, the best of the references for each measure; "
        "sources are cut to 256 tokens."
    )
    found = [_table(task, rows, measured["parameters"]) for task, rows in measured["tasks"].items()]
    return "\n\n".join([made, *found])


def mean(several: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of runs with several seeds: means, and the standard error of ROUGE-L; the first one's rate and samples."""
    numbers = [name for name in (*tasks.MEASURES, "loss", "trainable", "kept", "seconds") if name in several[0]]
    found = {name: statistics.fmean(one[name] for one in several) for name in numbers}
    spread = statistics.stdev(one["rougeL"] for one in several) if len(several) > 1 else 0.0
    kept = {name: several[0][name] for name in ("rate", "samples")}
    return {**found, "rougeL_error": spread / len(several) ** 0.5, "seeds": len(several), **kept}


def _arm(made: Runs, what: dict[str, Any]) -> dict[str, Any]:
    def one(rate: float, seed: int) -> dict[str, Any]:
        return made.of({**what, "rate": rate, "seed": seed, "steps": STEPS})

    if not (rates := arms()[what["arm"]]):
        return mean([one(0.0, SEEDS[0])])
    return mean(at_best_rate(one, rates, SEEDS))


def _table(task: str, found: dict[str, Any], parameters: int) -> str:
    lines = [f"| {' | '.join((task, *COLUMNS))} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, arm in found.items():
        cells = [
            name,
            f"{arm['rouge1']:.1f}",
            f"{arm['rouge2']:.1f}",
            f"{arm['rougeL']:.1f} ± {arm['rougeL_error']:.1f}",
            f"{arm['loss']:.3f}" if "loss" in arm else "",
            f"{100 * arm['trainable'] / parameters:.2f} %",
            f"{4 * arm['kept'] / 1000:,.0f}",
            f"{arm['seconds']:.0f}" if "seconds" in arm else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
