"""One run of the comparison in a process of its own: trains, answers the test inputs, says what it took.

`python -m tests.prove.summarise.runs FOLDER '{"model": …, "task": …, "arm": …, "rate": …, "seed": …, "steps": …}'`
prints one line of JSON; `model` is the digest of what is in the folder. It takes one thread, and leaves the other to a
run beside it; its seconds are those of the CPU, whatever else runs.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers

from prefix_store.geometry import Stack
from prefix_store.jobs import TrainingSpec
from prefix_store.model import frozen
from prefix_store.model.example import ExampleEncoder
from prefix_store.model.frozen import FrozenModel
from server.engine.prefix_loader import payload_of
from tests.prove.arms import timed_fit
from tests.prove.paper import baselines
from tests.prove.summarise import answers, tasks
from tests.prove.summarise.rivals import rivals, target_loss
from trainer import training_model
from trainer.data import Example, encode_lines
from trainer.methods import METHODS

VIRTUAL_TOKENS = 32
UNTUNED, INPUT = "untuned", "the input itself"
# What a job would ask for, and the learning rates that are tried.
OURS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "prefix": ({"method": "prefix"}, (0.05, 0.1, 0.2)),
    "prefix, decoder only": ({"method": "prefix", "stacks": (Stack.SELF,)}, (0.05, 0.1, 0.2)),
    "prefix, encoder only": ({"method": "prefix", "stacks": (Stack.ENCODER,)}, (0.05, 0.1, 0.2)),
    "prefix_mlp": ({"method": "prefix_mlp"}, (0.02, 0.05, 0.1)),
}


def main() -> None:
    """Reads the run from the command line, writes its result to stdout."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    print(json.dumps(measure(Path(sys.argv[1]), json.loads(sys.argv[2]))))


def measure(model: Path, run: dict[str, Any], rows: int | None = None) -> dict[str, Any]:
    """ROUGE, dev loss, trainable and kept numbers, CPU seconds of training. `rows`: of the task's only so many."""
    task, fresh = tasks.load(run["task"]).first(rows), frozen.load(model)
    if run["arm"] == INPUT:
        found = {"trainable": 0, "kept": 0, **_scored([row["prompt"] for row in task.test], task)}
    elif run["arm"] == UNTUNED:
        found = _untuned(fresh, task)
    elif run["arm"] in OURS:
        found = _ours(fresh, frozen.load(model), task, run)
    else:
        found = _rival(fresh, task, run)
    return {"rate": run["rate"], **found}


def _untuned(model: FrozenModel, task: tasks.Task) -> dict[str, Any]:
    loss = baselines.nats(model.model, _examples(model, task.dev), target_loss)
    written = answers.by_engine(model, _sources(model, task), None)
    return {"loss": loss, "trainable": 0, "kept": 0, **_scored(written, task)}


def _rival(model: FrozenModel, task: tasks.Task, run: dict[str, Any]) -> dict[str, Any]:
    tuned = rivals(VIRTUAL_TOKENS)[run["arm"]].prepare(model.model)
    found = baselines.train(
        tuned,
        _examples(model, task.train),
        _examples(model, task.dev),
        rate=run["rate"],
        steps=run["steps"],
        seed=run["seed"],
        loss_of=target_loss,
        clock=time.process_time,
    )
    written = answers.by_transformers(tuned, model.tokenizer, _sources(model, task))
    return {
        "loss": found["loss"],
        "trainable": found["trainable"],
        "kept": found["trainable"],
        "seconds": found["step_seconds"] * run["steps"],
        **_scored(written, task),
    }


def _ours(model: FrozenModel, served: FrozenModel, task: tasks.Task, run: dict[str, Any]) -> dict[str, Any]:
    trained = training_model.attach(model)
    train, dev = _examples(trained, task.train), _examples(trained, task.dev)
    spec = TrainingSpec(
        data_digest="", examples=len(train), learning_rate=run["rate"], steps=run["steps"], seed=run["seed"],
        batch_size=baselines.BATCH, virtual_tokens=VIRTUAL_TOKENS, **OURS[run["arm"]][0],
    )  # fmt: skip
    method = METHODS[spec.method](trained, spec, chain.from_iterable(example.source for example in train))
    result, seconds = timed_fit(trained, method, train, dev, spec, time.process_time)
    payload = payload_of(run["arm"], method.manifest(), result.tensors, served.dtype)
    return {
        "loss": result.valid_loss,
        "trainable": sum(parameter.numel() for parameter in method.parameters()),
        "kept": sum(tensor.numel() for tensor in result.tensors.values()),
        "seconds": seconds,
        **_scored(answers.by_engine(served, _sources(served, task), payload), task),
    }


def _scored(written: list[str], task: tasks.Task) -> dict[str, Any]:
    return {**tasks.rouge(written, [row["references"] for row in task.test]), "samples": written[:5]}


def _examples(model: FrozenModel, rows: list[tasks.Row]) -> list[Example]:
    """As a job encodes them: what is longer than the context loses its end."""
    encoder = ExampleEncoder(model.tokenizer, model.end_ids, start=model.start_ids)
    return [example for line in encode_lines(encoder, rows, model.context_length) for example in line]


def _sources(model: FrozenModel, task: tasks.Task) -> list[tuple[int, ...]]:
    return [example.source for example in _examples(model, [{**row, "completion": ""} for row in task.test])]


if __name__ == "__main__":
    main()
