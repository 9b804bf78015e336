"""Table-to-text as the paper has it: E2E and WebNLG, whole, small, or with some topics left out of training."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from tests.prove.bundled import data_folder

TRAIN, DEV, TEST, TUNING = 4_000, 200, 200, 50
UNSEEN = ("City", "ComicsCharacter", "Monument")


@dataclass(frozen=True)
class Task:
    """Rows to train on, rows to choose by, inputs to score with their references.

    `few` of the training rows, if any, drawn by the seed of the run. `unseen`: trained without those topics, scored on
    them alone.
    """

    name: str
    few: int | None = None
    unseen: bool = False

    @property
    def label(self) -> str:
        """For tables and files."""
        return self.name + ("-unseen" if self.unseen else "") + (f"-{self.few}" if self.few else "")

    def train(self, seed: int) -> list[dict[str, Any]]:
        """4,000 rows, the same for all seeds, or the seed's own few of them."""
        rows = [row for row in _read(self.name, "train") if not self.unseen or row["category"] not in UNSEEN]
        rows = random.Random(0).sample(rows, min(TRAIN, len(rows)))
        return random.Random(seed).sample(rows, self.few) if self.few else rows

    def dev(self) -> list[dict[str, Any]]:
        """Rows whose loss decides; as few as a user with few rows would have."""
        rows = [row for row in _read(self.name, "dev") if not self.unseen or row["category"] not in UNSEEN]
        return random.Random(0).sample(rows, min(DEV, self.few or DEV, len(rows)))

    def tuning(self) -> list[dict[str, Any]]:
        """Inputs with references by which a written prompt is chosen."""
        return random.Random(0).sample(_read(self.name, "dev_refs"), TUNING)

    def test(self) -> list[dict[str, Any]]:
        """The 200 inputs that every run answers, or those of unseen topics."""
        rows = _read(self.name, "test" if self.name == "e2e" else "test_seen")
        if self.unseen:
            rows = [row for row in rows if row["category"] in UNSEEN]
        return random.Random(0).sample(rows, min(TEST, len(rows)))


def scores(answers: list[str], references: list[list[str]]) -> dict[str, float]:
    """Corpus BLEU and chrF by sacrebleu, ROUGE-L (F, best reference, stemmed) by rouge-score, each of 100."""
    most = max(map(len, references))
    streams: Any = [[row[i] if i < len(row) else None for row in references] for i in range(most)]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    rouge = [
        max(scorer.score(reference, answer)["rougeL"].fmeasure for reference in row)
        for answer, row in zip(answers, references, strict=True)
    ]
    return {
        "bleu": float(sacrebleu.corpus_bleu(answers, streams).score),
        "rouge_l": 100 * sum(rouge) / len(rouge),
        "chrf": float(sacrebleu.corpus_chrf(answers, streams).score),
    }


def _read(name: str, part: str) -> list[dict[str, Any]]:
    lines = (data_folder() / name / f"{part}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]
