"""A run alone, from its first step to its last. Knows no jobs and no store."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from prefix_store.jobs import TrainingSpec
from prefix_store.model.frozen import FrozenModel
from trainer.data import Example
from trainer.methods.base import TuningMethod
from trainer.progress import Meter, Progress
from trainer.step import step
from trainer.tuning import Fit, Tuning


def fit(
    frozen: FrozenModel,
    method: TuningMethod,
    examples: Sequence[Example],
    spec: TrainingSpec,
    *,
    validate: Callable[[], float] | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    clock: Callable[[], float] = time.monotonic,
) -> Fit:
    """Takes `spec.steps` steps of AdamW and returns the best prefix. Equal seeds give equal bits.

    `on_progress` hears of every step and stops the run by raising. Raises ModelUnsupported where a layer gets no
    gradient, FloatingPointError where the loss is no number, and what the forward raises.
    """
    tuning = Tuning(method, examples, spec, validates=validate is not None)
    if validate is not None:
        tuning.judge(validate())
    meter = Meter(tuning, clock)
    while not tuning.done:
        (loss,) = step(frozen, [tuning])
        if isinstance(loss, Exception):
            raise loss
        valid_loss = None
        if validate is not None and tuning.due:
            valid_loss = validate()
            tuning.judge(valid_loss)
        on_progress(meter.progress(loss, valid_loss))
    return tuning.result()
