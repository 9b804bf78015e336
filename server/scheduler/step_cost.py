"""What a step costs by its tokens, learnt from the steps that ran, and so how long a chunk of prompt delays the others.

Seconds are a line in tokens, `a + b × tokens`: the weights are read once, every token is multiplied with them. Both
differ a thousandfold between a CPU and a GPU, so neither is set.
"""

from __future__ import annotations

from dataclasses import dataclass

# Of the newest step in its size's mean. One slow step among many should not count for much.
WEIGHT = 0.1


@dataclass
class _Mean:
    tokens: float
    seconds: float


class StepCost:
    """Running means of steps of similar size, one for each power of two, and the line through them."""

    def __init__(self) -> None:
        self._means: dict[int, _Mean] = {}

    def note(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        size = tokens.bit_length()
        mean = self._means.setdefault(size, _Mean(tokens, seconds))
        mean.tokens += WEIGHT * (tokens - mean.tokens)
        mean.seconds += WEIGHT * (seconds - mean.seconds)

    def equivalent(self, tokens: int) -> int | None:
        """How many more tokens would make a step of so many take twice as long; None as long as nobody can tell."""
        line = self._line()
        if line is None:
            return None
        fixed, each = line
        return int((fixed + each * tokens) / each)

    def _line(self) -> tuple[float, float] | None:
        """(a, b) by least squares through the means; None for fewer than two sizes, or where more takes no longer."""
        means = list(self._means.values())
        if len(means) < 2:
            return None
        middle = sum(mean.tokens for mean in means) / len(means)
        height = sum(mean.seconds for mean in means) / len(means)
        each = sum((mean.tokens - middle) * (mean.seconds - height) for mean in means) / sum(
            (mean.tokens - middle) ** 2 for mean in means
        )
        return (max(0.0, height - each * middle), each) if each > 0 else None
