"""What a user can say instead of tuning: an instruction, the best of ten, or examples in front of the prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

INSTRUCTIONS = (
    "{prompt}\n",
    "Describe this restaurant or place in one sentence.\n{prompt}\n",
    "Write a sentence that says all of this: {prompt}\n",
    "Table: {prompt}\nSentence:",
    "Data: {prompt}\nText:",
    "{prompt}\nIn words:",
    "Turn the facts into a sentence.\nFacts: {prompt}\nSentence:",
    "Facts:\n{prompt}\n\nA short description:",
    "Here is what we know: {prompt}. In one sentence:",
    "Q: What does this record say? {prompt}\nA:",
)


def instructed(rows: Sequence[dict[str, Any]], instruction: str) -> list[str]:
    """Prompts in an instruction."""
    return [instruction.replace("{prompt}", row["prompt"]) for row in rows]


def with_shots(
    rows: Sequence[dict[str, Any]], shots: Sequence[dict[str, Any]], fits: Callable[[str], bool]
) -> list[str]:
    """Prompts after examples, each a line of data and a line of text; the first ones are left out until it fits."""
    before = [f"{shot['prompt']}\n{shot['completion']}\n\n" for shot in shots]

    def prompt(row: dict[str, Any]) -> str:
        texts = ("".join([*before[first:], row["prompt"], "\n"]) for first in range(len(before) + 1))
        return next(filter(fits, texts))

    return [prompt(row) for row in rows]


def first_line(answer: str) -> str:
    """What an untuned model says before it goes on with something else."""
    return next((line.strip() for line in answer.splitlines() if line.strip()), "")
