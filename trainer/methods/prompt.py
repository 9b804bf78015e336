"""Prompt Tuning (Lester et al. 2021): soft tokens in front of the input embeddings, and nothing below them.

The prompt starts as the embeddings of real text and is parametrised as E0 + s * delta, with s the spread of the start,
as `prefix` is: a step of Adam moves each number by about the rate, in units of what is usual there.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from prefix_store.errors import ModelUnsupported
from prefix_store.jobs import TrainingSpec
from prefix_store.model import apply
from prefix_store.model.frozen import FrozenModel
from prefix_store.prefix import Method, Window
from trainer.methods.base import KVMethod
from trainer.methods.start import initial_ids


class SoftPrompt(KVMethod):
    """`P` virtual tokens as free input embeddings `[P, E]`; the model makes their keys and values, layer by layer.

    To the model they are tokens like any other at positions 0 to P - 1, so a sliding window leaves them behind.
    """

    payload = Method.PROMPT
    window = Window.SLIDES

    def __init__(self, frozen: FrozenModel, spec: TrainingSpec, text: Iterable[int]) -> None:
        super().__init__(frozen, spec)
        ids = torch.tensor(initial_ids(frozen.tokenizer, spec, text), device=frozen.device)
        self._start = frozen.model.get_input_embeddings()(ids).detach().float()
        width, expected = self._start.shape[1], frozen.geometry.hidden_size
        if width != expected:
            raise ModelUnsupported(
                f"{frozen.geometry.family}: its input embeddings have {width} numbers and its layers {expected}; "
                "a soft prompt needs them to be as many"
            )
        self._scale = self._start.std()
        self.delta = torch.nn.Parameter(torch.zeros_like(self._start))

    def parameters(self) -> list[torch.nn.Parameter]:
        """delta `[P, E]`, in units of the start's spread."""
        return [self.delta]

    def embeds(self) -> torch.Tensor:
        """The prompt now, `[P, E]`."""
        return self._start + self._scale * self.delta

    def kv(self) -> torch.Tensor:
        """What the frozen model makes of it, `[L, 2, Hkv, P, D]`."""
        return apply.prefill_embeds(self.frozen, self.embeds())

    def content(self) -> torch.Tensor:
        """The embeddings: the file keeps what was tuned."""
        return self.embeds()
