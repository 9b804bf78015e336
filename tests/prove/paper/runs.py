"""One run of the comparison in a process of its own: trains, answers the test inputs, says what it took.

`python -m tests.prove.paper.runs '{"model": …, "task": …, "arm": …, "rate": …, "seed": …, "steps": …}'` prints one line
of JSON; `model` is the bundled one's digest. A run of ours may have `options` of its training; it is then asked where
attention goes as well. A run for its `cost` alone has both threads; others leave one to a run beside them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import sys
import time
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import transformers

from prefix_store.jobs import TrainingSpec
from prefix_store.model import prompt
from server.engine.prefix_loader import payload_of
from server.scheduler.messages import PrefixPayload
from server.scheduler.sampling_params import SamplingParams
from tests.prove.arms import timed_fit
from tests.prove.bundled import Bench, load
from tests.prove.paper import baselines, weight, written
from tests.prove.paper.tasks import Task, scores
from trainer import training_model
from trainer.data import Example, tokenize
from trainer.methods import METHODS

LONGEST = 160  # tokens of an example
ANSWER = 80  # tokens of an answer
VIRTUAL_TOKENS = 48
RATES: dict[str, tuple[float, ...]] = {
    "prefix": (0.05, 0.1, 0.2),
    "prefix_mlp": (0.02, 0.05, 0.1),
    "prompt": (0.3, 1.0, 3.0),
    "prefix_plus": (0.03, 0.1, 0.3),
}


def main() -> None:
    """Reads the run from the command line, writes its result to stdout."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    run = json.loads(sys.argv[1])
    torch.set_num_threads(2 if "cost" in run else 1)
    print(json.dumps(measure(run)))


def measure(run: dict[str, Any]) -> dict[str, Any]:
    """Scores, dev loss, trainable numbers, bytes a task, seconds an epoch, peak memory, tokens written a second."""
    task = Task(**run["task"])
    arm = run["arm"]
    if arm.startswith("shots"):
        found = _shots(task, int(arm.split()[1]), run["seed"])
    elif arm == "instruction":
        found = _instruction(task)
    elif arm in METHODS:
        found = _ours(task, run)
    else:
        found = _baseline(task, run)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**found, "rate": run["rate"], "peak_mb": round(peak)}


def _baseline(task: Task, run: dict[str, Any]) -> dict[str, Any]:
    frozen = load()
    model = baselines.baselines(VIRTUAL_TOKENS)[run["arm"]].prepare(frozen.model)
    train, dev = _examples(frozen.tokenizer, task, run["seed"])
    found = baselines.train(model, train, dev, rate=run["rate"], steps=run["steps"], seed=run["seed"])
    inputs = task.test()
    ids = [prompt.encode(frozen.tokenizer, row["prompt"]) for row in inputs]
    begun = time.perf_counter()
    answers = baselines.write(model, frozen.tokenizer, ids, ANSWER)
    return {
        "loss": found["loss"],
        "trainable": found["trainable"],
        "bytes": 4 * found["trainable"],
        "epoch_seconds": found["step_seconds"] * math.ceil(len(train) / baselines.BATCH),
        **_scored(answers, inputs, frozen.tokenizer, begun),
    }


def _ours(task: Task, run: dict[str, Any]) -> dict[str, Any]:
    frozen = training_model.attach(load())
    train, dev = _examples(frozen.tokenizer, task, run["seed"])
    chosen: dict[str, Any] = {"virtual_tokens": 0 if run["arm"] == "prefix_plus" else VIRTUAL_TOKENS}
    spec = TrainingSpec(
        data_digest="", examples=len(train), method=run["arm"], learning_rate=run["rate"], steps=run["steps"],
        batch_size=baselines.BATCH, seed=run["seed"], **chosen | run.get("options", {}),
    )  # fmt: skip
    text = chain.from_iterable(example.ids for example in train)
    method = METHODS[spec.method](frozen, spec, text)
    result, seconds = timed_fit(frozen, method, train, dev, spec)
    payload = payload_of(run["arm"], method.manifest(), result.tensors, frozen.dtype)
    kept = sum(tensor.numel() for tensor in result.tensors.values())
    bench, inputs = Bench(), task.test()
    begun = time.perf_counter()
    answers = _written(bench, [row["prompt"] for row in inputs], payload)
    return {
        "loss": result.valid_loss,
        "trainable": sum(parameter.numel() for parameter in method.parameters()),
        "bytes": 4 * kept,
        "epoch_seconds": seconds / spec.steps * math.ceil(len(train) / baselines.BATCH),
        **_scored(answers, inputs, frozen.tokenizer, begun),
        **({"weight": weight.of(frozen, method.manifest(), result.tensors, inputs)} if "options" in run else {}),
    }


def _instruction(task: Task) -> dict[str, Any]:
    bench, tuning = Bench(), task.tuning()
    references = [row["references"] for row in tuning]

    def bleu(instruction: str) -> float:
        answers = _written(bench, written.instructed(tuning, instruction))
        return scores([written.first_line(answer) for answer in answers], references)["bleu"]

    best = max(written.INSTRUCTIONS, key=bleu)
    return {"instruction": best, **_said(bench, task, written.instructed(task.test(), best))}


def _shots(task: Task, count: int, seed: int) -> dict[str, Any]:
    bench, shots = Bench(), dataclasses.replace(task, few=count).train(seed)
    most = bench.model.context_length - ANSWER

    def fits(text: str) -> bool:
        return len(prompt.encode(bench.model.tokenizer, text)) <= most

    return _said(bench, task, written.with_shots(task.test(), shots, fits))


def _said(bench: Bench, task: Task, prompts: Sequence[str]) -> dict[str, Any]:
    inputs, begun = task.test(), time.perf_counter()
    answers = [written.first_line(answer) for answer in _written(bench, prompts)]
    longest = max(len(text.encode()) - len(row["prompt"].encode()) for text, row in zip(prompts, inputs, strict=True))
    return {"trainable": 0, "bytes": longest, **_scored(answers, inputs, bench.model.tokenizer, begun)}


def _written(bench: Bench, prompts: Sequence[str], payload: PrefixPayload | None = None) -> list[str]:
    return bench.write(prompts, SamplingParams(max_tokens=ANSWER, temperature=0.0), payload)


def _scored(answers: Sequence[str], inputs: Sequence[dict[str, Any]], tokenizer: Any, begun: float) -> dict[str, Any]:
    seconds = time.perf_counter() - begun
    texts = [answer.strip() for answer in answers]
    tokens = sum(len(tokenizer(text, add_special_tokens=False).input_ids) + 1 for text in texts)
    found = scores(texts, [row["references"] for row in inputs])
    return {**found, "tokens_per_second": tokens / seconds, "samples": texts[:5]}


def _examples(tokenizer: Any, task: Task, seed: int) -> tuple[list[Example], list[Example]]:
    return tokenize(tokenizer, task.train(seed), LONGEST), tokenize(tokenizer, task.dev(), LONGEST)


if __name__ == "__main__":
    main()
