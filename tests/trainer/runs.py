"""Small runs on a tiny model, for the tests of what trains them."""

from __future__ import annotations

from itertools import chain
from typing import Any

from prefix_store.jobs import TrainingSpec
from tests.models import tiny_frozen, tiny_tokenizer
from trainer import data, training_model
from trainer.methods import METHODS
from trainer.tuning import Tuning

FROZEN = training_model.attach(tiny_frozen("llama"))
# of unequal lengths, so that means over other tokens than a run's own are others
EXAMPLES = data.tokenize(
    tiny_tokenizer(),
    [{"prompt": f"{number} is", "completion": " a number" * (1 + number % 3)} for number in range(12)],
    48,
)


def spec(**options: Any) -> TrainingSpec:
    small = {"virtual_tokens": 4, "steps": 20, "batch_size": 4, "learning_rate": 0.3}
    return TrainingSpec("0" * 64, len(EXAMPLES), **{**small, **options})


def make(examples: list[data.Example] = EXAMPLES, *, validates: bool = False, **options: Any) -> Tuning:
    """A run that has not begun."""
    chosen = spec(**options)
    text = chain.from_iterable(example.ids for example in examples)
    return Tuning(METHODS[chosen.method](FROZEN, chosen, text), examples, chosen, validates=validates)
