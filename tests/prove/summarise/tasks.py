"""Dialogues to sum up, captions to rewrite, news to put into simpler or harder words; and ROUGE.

DialogSum comes without its training rows here: most of dev is learned from, and the rest of it is to choose by. The
others have their own rows to learn from. What has no test rows is scored on a half of dev. No dialogue is left out
for its length: the model reads the first 256 tokens of each (of 36 % it misses the end).
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from rouge_score.rouge_scorer import RougeScorer

from tests.prove.bundled import data_folder

Row = dict[str, Any]
MEASURES = ("rouge1", "rouge2", "rougeL")
DIALOGUES = "dialogsum"
NAMES = (DIALOGUES, "captions", "onestop_adv_to_ele", "onestop_ele_to_int")
DEV = 50  # rows to choose by, at most


@dataclass(frozen=True)
class Task:
    """Rows to learn from, rows to choose by, both with a `completion`, and rows to score, with `references`."""

    train: list[Row]
    dev: list[Row]
    test: list[Row]

    def first(self, rows: int | None) -> Task:
        """So many of each, for a trial; None is all."""
        return Task(self.train[:rows], self.dev[:rows], self.test[:rows])


def load(name: str) -> Task:
    """One of `NAMES`, always the same rows in the same order."""
    if name == DIALOGUES:
        learned = _shuffled(_read("dialogsum/dev"))
        return Task(learned[DEV:], learned[:DEV], _read("dialogsum/test"))
    train, dev = _read(f"style/{name}/train"), _shuffled(_read(f"style/{name}/dev"))
    if (data_folder() / "style" / name / "test.jsonl").exists():
        return Task(train, dev[:DEV], _scored(_read(f"style/{name}/test")))
    half = len(dev) // 2
    return Task(train, dev[:half][:DEV], _scored(dev[half:]))


def rouge(answers: list[str], references: list[list[str]]) -> dict[str, float]:
    """ROUGE-1, -2 and -L by rouge-score, F of 100 with Porter's stems: the mean of what each answer's best gives.

    The best of the references is chosen for each measure by itself.
    """
    scorer = RougeScorer(list(MEASURES), use_stemmer=True)
    best = [
        {measure: max(one[measure].fmeasure for one in found) for measure in MEASURES}
        for found in (
            [scorer.score(reference, answer) for reference in row]
            for answer, row in zip(answers, references, strict=True)
        )
    ]
    return {measure: 100 * sum(one[measure] for one in best) / len(best) for measure in MEASURES}


def _scored(rows: list[Row]) -> list[Row]:
    return [{**row, "references": [row["completion"]]} for row in rows]


def _shuffled(rows: list[Row]) -> list[Row]:
    return random.Random(0).sample(rows, len(rows))


def _read(part: str) -> list[Row]:
    lines = (data_folder() / f"{part}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]
