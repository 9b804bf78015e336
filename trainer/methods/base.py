"""The face that every tuning method shows to the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch

from prefix_store.jobs import TrainingSpec
from prefix_store.model.apply import PrefixRows
from prefix_store.model.frozen import FrozenModel
from prefix_store.prefix import PrefixManifest
from prefix_store.tensors import PrefixTensors


class TuningMethod(Protocol):
    """One prefix being tuned on a frozen model. The loop steps its parameters and knows nothing else of it."""

    def parameters(self) -> list[torch.nn.Parameter]:
        """What the optimiser moves, float32."""

    def rows(self, count: int) -> PrefixRows:
        """The prefix for `count` rows of a batch, differentiable in the parameters."""

    def layers_without_gradient(self) -> list[int]:
        """Layers that the last backward did not reach; none in a sound run."""

    def manifest(self) -> PrefixManifest:
        """What will stand in the header of the finished prefix."""

    def tensors(self) -> PrefixTensors:
        """A copy of the prefix as it is now, canonical, float32, on the CPU."""


# Makes a method from the frozen model, the job's specification and the token ids of its training text.
NewMethod = Callable[[FrozenModel, TrainingSpec, Iterable[int]], TuningMethod]
