"""E2E NLG, the paper's table-to-text task: a `prefix` tuned on real data that does not ship, scored by BLEU."""

from __future__ import annotations

import json
from functools import partial
from itertools import chain
from typing import Any

import sacrebleu
from rich.progress import Progress as Bar

from prefix_store.jobs import TrainingSpec
from server.engine.prefix_loader import payload_of
from server.scheduler.sampling_params import SamplingParams
from tests.judging import nats_per_token
from tests.prove.bundled import Bench, data_folder, load
from trainer import training_model
from trainer.data import batches, tokenize
from trainer.loop import Fit, fit
from trainer.methods import METHODS
from trainer.methods.base import TuningMethod

SECTION = "tables"
TRAIN, DEV, TEST = 20_000, 200, 200
BLEU = 40
SPEC = TrainingSpec(
    data_digest="", examples=TRAIN, virtual_tokens=48, steps=1500, batch_size=16, learning_rate=0.2, seed=1
)
LONGEST = 160  # tokens of an example, and of an answer


def run() -> dict[str, Any]:
    """Tunes on the training rows, keeps the best by dev loss, answers the first test inputs greedily."""
    method, result = tune()
    payload = payload_of("e2e", method.manifest(), result.tensors, load().dtype)
    inputs = read("test")[:TEST]
    params = SamplingParams(max_tokens=LONGEST, temperature=0.0)
    answers = Bench().write([row["prompt"] for row in inputs], params, payload)
    texts = [answer.strip() for answer in answers]
    for row, text in list(zip(inputs, texts, strict=True))[:10]:
        print(f"{row['prompt']}\n    {text}")
    return {
        "bleu": bleu(texts, [row["references"] for row in inputs]),
        "dev_nats_per_token": {"before": result.start_loss, "after": result.valid_loss},
        "spec": {name: getattr(SPEC, name) for name in ("virtual_tokens", "steps", "batch_size", "learning_rate")},
    }


def tune() -> tuple[TuningMethod, Fit]:
    """A prefix on E2E's training rows, through the trainer's own loop."""
    frozen = training_model.attach(load())
    encode = partial(tokenize, frozen.tokenizer, max_length=LONGEST)
    train, dev = encode(read("train")[:TRAIN]), encode(read("dev")[:: len(read("dev")) // DEV])
    method = METHODS[SPEC.method](frozen, SPEC, chain.from_iterable(example.ids for example in train))
    with Bar() as bar:
        shown = bar.add_task("tuning on E2E", total=SPEC.steps)
        return method, fit(
            frozen,
            method,
            train,
            SPEC,
            validate=lambda: nats_per_token(frozen, method.rows, batches(dev, 32)),
            on_progress=lambda progress: bar.update(
                shown, completed=progress.step, description=f"tuning on E2E, loss {progress.train_loss:.3f}"
            ),
        )


def read(name: str) -> list[dict[str, Any]]:
    """A file of the task; a completion begins on the line after its table."""
    rows = [json.loads(line) for line in (data_folder() / "e2e" / f"{name}.jsonl").read_text("utf-8").splitlines()]
    return [{**row, "completion": f"\n{row['completion']}"} if "completion" in row else row for row in rows]


def bleu(answers: list[str], references: list[list[str]]) -> float:
    """Corpus BLEU by sacrebleu, every reference of an input counted."""
    most = max(map(len, references))
    streams = [[row[i] if i < len(row) else None for row in references] for i in range(most)]
    return float(sacrebleu.corpus_bleu(answers, streams).score)


def missed(measured: dict[str, Any]) -> list[str]:
    """The bars that were not reached."""
    return [] if measured["bleu"] >= BLEU else [f"BLEU of at least {BLEU}"]


def table(measured: dict[str, Any]) -> str:
    """For the README."""
    return f"E2E NLG, {TEST} test inputs, greedy: BLEU {measured['bleu']:.1f}."
