"""The training loop: one prefix, one frozen model, the tokens that count. Knows no jobs and no store."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from prefix_store.errors import ModelUnsupported
from prefix_store.jobs import TrainingSpec
from prefix_store.model.frozen import FrozenModel
from prefix_store.tensors import PrefixTensors
from trainer import forward, objective, schedule
from trainer.data import Example, shuffled_batches
from trainer.forward import Group
from trainer.methods.base import TuningMethod

VALIDATIONS = 10  # a run, besides the one at its start
CLIP = 1.0


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a step; losses in nats per token that counts."""

    step: int
    total_steps: int
    train_loss: float
    valid_loss: float | None
    learning_rate: float
    tokens_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class Fit:
    """The prefix that a run keeps: its best by validation, or its last where nothing validates."""

    tensors: PrefixTensors
    step: int
    valid_loss: float | None
    start_loss: float | None


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
    gradient, FloatingPointError where the loss is no number.
    """
    optimiser = torch.optim.AdamW(method.parameters(), weight_decay=spec.weight_decay)
    start_loss = _number(validate(), "validation") if validate is not None else None
    best = Fit(method.tensors(), 0, start_loss, start_loss)
    started, tokens = clock(), 0
    stream = shuffled_batches(examples, spec.batch_size, spec.seed)
    for step in range(1, spec.steps + 1):
        batch = next(stream)
        rate = spec.learning_rate * schedule.share(spec.schedule, step, spec.steps, spec.warmup)
        train_loss = _update(frozen, method, optimiser, batch, rate)
        valid_loss = None
        if validate is not None and is_due(step, spec.steps, VALIDATIONS):
            valid_loss = _number(validate(), "validation")
        if valid_loss is not None and best.valid_loss is not None and valid_loss < best.valid_loss:
            best = Fit(method.tensors(), step, valid_loss, start_loss)
        tokens += sum(len(example.ids) for example in batch)
        elapsed = max(clock() - started, 1e-9)
        left = elapsed / step * (spec.steps - step)
        on_progress(Progress(step, spec.steps, train_loss, valid_loss, rate, tokens / elapsed, left))
    return best if validate is not None else Fit(method.tensors(), spec.steps, None, None)


def is_due(step: int, steps: int, times: int) -> bool:
    """Whether a step, counted from 1, is one of at most `times` spread evenly over the run, or its last."""
    return step == steps or step % math.ceil(steps / times) == 0


def _update(
    frozen: FrozenModel, method: TuningMethod, optimiser: torch.optim.Optimizer, batch: list[Example], rate: float
) -> float:
    """One step; returns the loss before it, averaged over the batch's tokens that count."""
    group = Group(method.rows(len(batch)), batch)
    (logits,) = forward.logits(frozen, [group])
    loss = objective.loss(logits, group)
    number = _number(loss.item(), "training")
    optimiser.zero_grad()
    loss.backward()
    # a layer that is cut off at the first step stays cut off
    if not optimiser.state and (lost := method.layers_without_gradient()):
        raise ModelUnsupported(f"{frozen.geometry.family}: no gradient reaches the prefix in layers {lost}")
    torch.nn.utils.clip_grad_norm_(method.parameters(), CLIP)
    for settings in optimiser.param_groups:
        settings["lr"] = rate
    optimiser.step()
    return number


def _number(loss: float, what: str) -> float:
    if not math.isfinite(loss):
        raise FloatingPointError(f"the {what} loss became {loss}; a smaller learning_rate may help")
    return loss
