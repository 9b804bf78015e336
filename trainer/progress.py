"""Where a run stands, for its owner to read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trainer.tuning import Fit, Tuning


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a step; losses in nats per completion token.

    Speed and time left are None for a run that was taken up again and has yet to take its first step here.
    `trained_tokens`: tokens of all the examples that were shown, each as often as it was.
    """

    step: int
    total_steps: int
    train_loss: float
    valid_loss: float | None
    learning_rate: float
    tokens_per_second: float | None
    seconds_left: float | None
    trained_tokens: int = 0


class Meter:
    """Tells how fast a run is since it was begun, or taken up again, here; neighbours take their part of the time."""

    def __init__(self, tuning: Tuning, clock: Callable[[], float]) -> None:
        self._tuning, self._clock = tuning, clock
        self._started, self._first, self._tokens = clock(), tuning.step, tuning.tokens

    def progress(self, train_loss: float, valid_loss: float | None) -> Progress:
        """After a step, or the validation of one that was taken before."""
        tuning, steps = self._tuning, self._tuning.spec.steps
        speed = left = None
        if (taken := tuning.step - self._first) > 0:
            elapsed = max(self._clock() - self._started, 1e-9)
            speed, left = (tuning.tokens - self._tokens) / elapsed, elapsed / taken * (steps - tuning.step)
        return Progress(tuning.step, steps, train_loss, valid_loss, tuning.rate, speed, left, tuning.tokens)


def line(progress: Progress) -> str:
    """A step for people to read."""
    parts = [f"step {progress.step}/{progress.total_steps}", f"loss {progress.train_loss:.3f}"]
    parts += [f"validation {progress.valid_loss:.3f}"] if progress.valid_loss is not None else []
    parts += [f"{progress.tokens_per_second:,.0f} tokens/s"] if progress.tokens_per_second is not None else []
    parts += [f"{progress.seconds_left:.0f} s left"] if progress.seconds_left is not None else []
    return ", ".join(parts)


def summary(result: Fit) -> str:
    """What was gained, for people to read."""
    if result.valid_loss is None:
        return f"keeping step {result.step}; too few examples to validate on"
    bare = f", {result.bare_loss:.3f} without a prefix" if result.bare_loss is not None else ""
    return (
        f"keeping step {result.step}: validation loss {result.start_loss:.3f} before, "
        f"{result.valid_loss:.3f} after{bare}"
    )


def say(line: str) -> None:
    """One line for the operator."""
    print(f"antefix worker: {line}", flush=True)
