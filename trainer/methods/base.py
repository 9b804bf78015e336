"""The face that every tuning method shows to the training loop, and what methods have in common behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

import torch

from prefix_store.jobs import TrainingSpec
from prefix_store.model.frozen import FrozenModel
from prefix_store.model.rows import PrefixRows, Rows
from prefix_store.prefix import Method, PrefixManifest, Window
from prefix_store.tensors import PAYLOADS, PrefixTensors
from trainer.methods.start import Start


class TuningMethod(Protocol):
    """One prefix being tuned on a frozen model. The loop steps its parameters and knows nothing else of it."""

    def parameters(self) -> list[torch.nn.Parameter]:
        """What the optimiser moves, float32."""

    def rows(self, count: int) -> Rows:
        """The prefix for `count` rows of a batch, differentiable in the parameters."""

    def layers_without_gradient(self) -> Sequence[int | str]:
        """Layers that the last backward did not reach; none in a sound run."""

    def manifest(self) -> PrefixManifest:
        """What will stand in the header of the finished prefix."""

    def tensors(self) -> PrefixTensors:
        """A copy of the prefix as it is now, canonical, float32, on the CPU."""


# Makes a method from the frozen model, the job's specification and what the prefix starts from: the token ids of the
# training text, or the tensors of another prefix where the job names one.
NewMethod = Callable[[FrozenModel, TrainingSpec, Start], TuningMethod]


class KVMethod(ABC):
    """A tuning method whose `P` virtual tokens act through keys and values: a subclass says what is tuned, and how.

    A subclass whose file holds something else than its KV also names the `payload` and overrides `content`.
    """

    payload: ClassVar[Method] = Method.PREFIX  # what the finished file holds
    window: ClassVar[Window] = Window.ALWAYS

    def __init__(self, frozen: FrozenModel, spec: TrainingSpec) -> None:
        self.frozen = frozen
        self.virtual_tokens = spec.virtual_tokens
        self._last: torch.Tensor | None = None  # what the next backward goes through, by its first axis

    @abstractmethod
    def parameters(self) -> list[torch.nn.Parameter]:
        """What the optimiser moves, float32."""

    @abstractmethod
    def kv(self) -> torch.Tensor:
        """The prefix now, `[L, 2, Hkv, P, D]`, keys as they stand in a cache, differentiable in the parameters."""

    def content(self) -> torch.Tensor:
        """What the finished file holds, in its canonical layout."""
        return self.kv()

    def rows(self, count: int) -> Rows:
        """Every row shares the one prefix; real tokens start after it."""
        return PrefixRows.shared(self.tracked(), count, self.virtual_tokens, self.window)

    def tracked(self) -> torch.Tensor:
        """`kv`, whose gradient is kept for `layers_without_gradient`."""
        kv = self.kv()
        if kv.requires_grad:
            kv.retain_grad()
            self._last = kv
        return kv

    def layers_without_gradient(self) -> Sequence[int]:
        """Layers whose keys and values the last backward did not reach."""
        gradient = None if self._last is None else self._last.grad
        if gradient is None:
            return list(range(self.frozen.geometry.layers))
        return [layer for layer in range(len(gradient)) if not gradient[layer].any()]

    def manifest(self) -> PrefixManifest:
        """Bound to this very base model."""
        return PrefixManifest(
            method=self.payload,
            geometry=self.frozen.geometry,
            virtual_tokens=self.virtual_tokens,
            position_offset=self.virtual_tokens,
            base_digest=self.frozen.digest,
            window=self.window,
        )

    @torch.no_grad()
    def tensors(self) -> PrefixTensors:
        """A copy of the content, under the name that the payload has in the file."""
        return {PAYLOADS[self.payload]: self.content().clone().cpu().contiguous()}
