"""Prompt Tuning (Lester et al. 2021): soft tokens in front of the input embeddings, and nothing below them.

In a decoder-only model nothing that follows changes what the layers make of them, so they are keys and values as soon
as they are known. An encoder looks both ways: there they stay embeddings, and every source makes its own of them.

The prompt starts as the embeddings of real text and is parametrised as E0 + s * delta, with s the spread of the start,
as `prefix` is: a step of Adam moves each number by about the rate, in units of what is usual there.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence

import torch

from prefix_store.errors import ModelUnsupported
from prefix_store.jobs import TrainingSpec
from prefix_store.model import apply
from prefix_store.model.frozen import FrozenModel
from prefix_store.model.rows import Rows, StackRows
from prefix_store.prefix import Method, PrefixManifest, Window
from trainer.methods.base import KVMethod
from trainer.methods.start import Start, initial_embeds


class PromptMethod(KVMethod):
    """A method that makes `P` input embeddings `[P, E]`; the model makes their keys and values, layer by layer.

    To the model they are tokens like any other at positions 0 to P - 1, so a sliding window leaves them behind. In an
    encoder-decoder model they stand in front of the source, and the decoder begins at 0.
    """

    payload = Method.PROMPT
    window = Window.SLIDES

    @abstractmethod
    def embeds(self) -> torch.Tensor:
        """The prompt now, `[P, E]`, differentiable in the parameters."""

    def kv(self) -> torch.Tensor:
        """What the frozen model makes of it, `[L, 2, Hkv, P, D]`."""
        return apply.prefill_embeds(self.frozen, self.embeds())

    def rows(self, count: int) -> Rows:
        """Every row shares the one prompt."""
        if not self.frozen.is_encoder_decoder:
            return super().rows(count)
        embeds = self.embeds()
        if embeds.requires_grad:
            embeds.retain_grad()
            self._last = embeds
        return StackRows.prompt(embeds, count)

    def layers_without_gradient(self) -> Sequence[int]:
        """Layers that the last backward did not reach; of embeddings it reaches all or none."""
        if not self.frozen.is_encoder_decoder:
            return super().layers_without_gradient()
        is_reached = self._last is not None and self._last.grad is not None and bool(self._last.grad.any())
        return [] if is_reached else range(self.frozen.geometry.layers)

    def manifest(self) -> PrefixManifest:
        """Bound to this very base model."""
        offset = 0 if self.frozen.is_encoder_decoder else self.virtual_tokens
        return dataclasses.replace(super().manifest(), position_offset=offset)

    def content(self) -> torch.Tensor:
        """The embeddings: the file keeps what was tuned."""
        return self.embeds()

    def initial_embeds(self, spec: TrainingSpec, start: Start) -> torch.Tensor:
        """Where the prompt starts, `[P, E]`. Raises ModelUnsupported where the layers are not as wide."""
        embeds = initial_embeds(self.frozen, spec, start)
        width, expected = embeds.shape[1], self.frozen.geometry.hidden_size
        if width != expected:
            raise ModelUnsupported(
                f"{self.frozen.geometry.family}: its input embeddings have {width} numbers and its layers {expected}; "
                "a soft prompt needs them to be as many"
            )
        return embeds


class SoftPrompt(PromptMethod):
    """`P` virtual tokens as free input embeddings `[P, E]`."""

    def __init__(self, frozen: FrozenModel, spec: TrainingSpec, start: Start) -> None:
        super().__init__(frozen, spec)
        self._start = self.initial_embeds(spec, start)
        self._scale = self._start.std()
        self.delta = torch.nn.Parameter(torch.zeros_like(self._start))

    def parameters(self) -> list[torch.nn.Parameter]:
        """delta `[P, E]`, in units of the start's spread."""
        return [self.delta]

    def embeds(self) -> torch.Tensor:
        """The prompt now, `[P, E]`."""
        return self._start + self._scale * self.delta
