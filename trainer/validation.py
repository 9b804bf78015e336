"""One pass over the validation examples, in slices, so that it never keeps others waiting for long."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prefix_store.model.rows import Rows
from trainer.data import Example
from trainer.forward import Group


class Validation:
    """The mean -log p over every target token of the examples; `rows` None is the bare model.

    Whoever runs it scores `group` after `group` and adds what came out, until it is `done`.
    """

    def __init__(self, examples: Sequence[Example], size: int, rows: Callable[[int], Rows] | None) -> None:
        self._examples, self._size, self._rows = examples, size, rows
        self._next, self._nats, self._tokens = 0, 0.0, 0

    @property
    def is_bare(self) -> bool:
        """Whether it is the model without a prefix that is judged."""
        return self._rows is None

    @property
    def done(self) -> bool:
        """Whether every example was counted."""
        return self._next >= len(self._examples)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self._nats / self._tokens

    def group(self) -> Group:
        """The next slice."""
        some = self._examples[self._next : self._next + self._size]
        return Group(self._rows(len(some)) if self._rows is not None else None, some)

    def add(self, nats: float) -> None:
        """What the slice cost in all."""
        some = self._examples[self._next : self._next + self._size]
        self._nats += nats
        self._tokens += sum(len(example.targets) for example in some)
        self._next += len(some)
