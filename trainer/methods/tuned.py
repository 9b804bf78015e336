"""A tensor that is tuned by how far it is from where it began, in a unit that fits it."""

from __future__ import annotations

import torch


class Tuned:
    """start + unit * delta, of which delta is the parameter, zero at first; `unit` is any shape that fits the start's.

    A step of Adam moves each number by about the learning rate times its unit, so that one rate suits tensors of any
    scale, and decaying delta leads back to the start, not to zero.
    """

    def __init__(self, start: torch.Tensor, unit: torch.Tensor | float) -> None:
        self.start, self.unit = start, unit
        self.delta = torch.nn.Parameter(torch.zeros_like(start))

    def value(self) -> torch.Tensor:
        """The tensor now, differentiable in `delta`."""
        return self.start + self.unit * self.delta
