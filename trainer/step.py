"""One step of any number of prefixes at once: their rows share a forward and a backward through the frozen model.

What is minimised is the sum over runs of each run's mean over its own tokens. No number of one run is in another's
part, so each gets the gradient that it would get alone, and clips and steps by that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from prefix_store.model.frozen import FrozenModel
from trainer import evaluate, forward
from trainer.tuning import Tuning, finite
from trainer.validation import Validation

T = TypeVar("T")
R = TypeVar("R")


def step(frozen: FrozenModel, tunings: Sequence[Tuning]) -> list[float | Exception]:
    """Steps each once; for each the loss before it, or what ended it.

    A run that fails is left as it was and keeps no other from its step.
    """
    found = _each(lambda some: _gradients(frozen, some), tunings)
    return [_update(tuning, loss) for tuning, loss in zip(tunings, found, strict=True)]


@torch.no_grad()
def score(frozen: FrozenModel, passes: Sequence[Validation]) -> list[float | Exception]:
    """Runs the next slice of each; for each what it cost in nats, or what ended it."""
    return _each(lambda some: evaluate.nats(frozen, [one.group() for one in some]), passes)


def _gradients(frozen: FrozenModel, tunings: Sequence[Tuning]) -> list[float]:
    groups = [tuning.group() for tuning in tunings]
    sums = forward.losses(frozen, groups)
    losses = [found / len(group.labels) for found, group in zip(sums, groups, strict=True)]
    numbers = [finite(loss.item(), "training") for loss in losses]
    torch.stack(losses).sum().backward()
    return numbers


def _update(tuning: Tuning, loss: float | Exception) -> float | Exception:
    if isinstance(loss, Exception):
        return loss
    try:
        tuning.update(loss)
    except Exception as error:
        return error
    return loss


def _each(work: Callable[[Sequence[T]], list[R]], items: Sequence[T]) -> list[R | Exception]:
    """What is done for all at once, or where that fails, for one after another: who fails alone has failed."""
    try:
        return [*work(items)]
    except Exception as error:
        if len(items) == 1:
            return [error]
    return [found for item in items for found in _each(work, [item])]
