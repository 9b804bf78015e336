"""One step of any number of prefixes at once: their rows share a forward and a backward through the frozen model.

What is minimised is the sum over runs of each run's mean over its own tokens. No number of one run is in another's
part, so each gets the gradient that it would get alone, and clips and steps by that.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from prefix_store.model.frozen import FrozenModel
from trainer import forward
from trainer.tuning import Tuning, finite
from trainer.validation import Validation

T = TypeVar("T")
R = TypeVar("R")


def step(
    frozen: FrozenModel, tunings: Sequence[Tuning], apart: Callable[[Exception], None] = lambda error: None
) -> list[float | Exception]:
    """Steps each once; for each the loss before it, or what ended it.

    A run that fails is left as it was and keeps no other from its step. `apart` hears why those that were to share it
    could not, and took it one by one.
    """
    found = _each(lambda some: _gradients(frozen, some), tunings, apart)
    return [_update(tuning, loss) for tuning, loss in zip(tunings, found, strict=True)]


@torch.no_grad()
def score(
    frozen: FrozenModel, passes: Sequence[Validation], apart: Callable[[Exception], None] = lambda error: None
) -> list[float | Exception]:
    """Runs the next slice of each; for each what it cost in nats, or what ended it. `apart`: as in `step`."""
    return _each(lambda some: _nats(frozen, some), passes, apart)


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


def _nats(frozen: FrozenModel, passes: Sequence[Validation]) -> list[float]:
    return [found.item() for found in forward.losses(frozen, [one.group() for one in passes])]


def _each(
    work: Callable[[Sequence[T]], list[R]], items: Sequence[T], apart: Callable[[Exception], None]
) -> list[R | Exception]:
    """What is done for all at once, or where that fails, for one after another: who fails alone has failed."""
    try:
        return [*work(items)]
    except Exception as error:
        # an error keeps what the calls below it had made, and the next one may need that memory
        traceback.clear_frames(error.__traceback__)
        if len(items) == 1:
            return [error]
        apart(error)
    return [found for item in items for found in _each(work, [item], apart)]
