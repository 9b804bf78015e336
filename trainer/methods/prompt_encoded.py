"""P-tuning (Liu et al. 2021, arXiv 2103.10385): a soft prompt that an encoder makes, an MLP or an LSTM before an MLP.

The encoders are PEFT's. The file keeps the embeddings that come out, so that what is served is a soft prompt like any.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from prefix_store.jobs import TrainingSpec
from prefix_store.model.frozen import FrozenModel
from trainer.methods.encoder import Encoder
from trainer.methods.prompt import PromptMethod
from trainer.methods.start import Start

LSTM_LAYERS = 2


class LSTMStates(nn.LSTM):
    """An LSTM whose output is the states of its last layer alone."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Virtual tokens `[P, E]` in the order of the prompt to `[P, 2 * hidden_size]`, both directions together."""
        states: torch.Tensor = super().forward(inputs)[0]
        return states


class EncodedPrompt(PromptMethod):
    """`P` virtual tokens as input embeddings `[P, E]` that an encoder with a width of `spec.bottleneck` makes.

    `gain`: how many times as large as torch draws them its weights are. As drawn, numbers shrink from layer to layer,
    in an LSTM to a hundredth: the last layer's fitted weights are then large, and a step of them, in the unit of what
    was drawn, moves next to nothing.
    """

    gain: ClassVar[float]

    def __init__(self, frozen: FrozenModel, spec: TrainingSpec, start: Start) -> None:
        super().__init__(frozen, spec)
        target = self.initial_embeds(spec, start)
        width = target.shape[1]
        self.encoder = Encoder(partial(self.drawn, width, spec.bottleneck), width, target, target.std(), spec.seed)

    @classmethod
    def drawn(cls, width: int, middle: int) -> nn.Module:
        """A new body with weights of a size that suits."""
        made = cls.body(width, middle)
        with torch.no_grad():
            for name, weights in made.named_parameters():
                if "weight" in name:
                    weights.mul_(cls.gain)
        return made

    @staticmethod
    @abstractmethod
    def body(width: int, middle: int) -> nn.Module:
        """All of a new encoder but its last layer: `[P, width]` to any number of features a virtual token."""

    def parameters(self) -> list[torch.nn.Parameter]:
        """The encoder's own embeddings `[P, E]` and its weights, as distances from their start."""
        return self.encoder.parameters()

    def embeds(self) -> torch.Tensor:
        """What the encoder makes now, `[P, E]`."""
        return self.encoder.output()


class MLPPrompt(EncodedPrompt):
    """P-tuning with an MLP, in which virtual tokens share weights and do not see one another."""

    gain = 3.0

    @staticmethod
    def body(width: int, middle: int) -> nn.Module:
        """The first two of three layers."""
        return nn.Sequential(nn.Linear(width, middle), nn.ReLU(), nn.Linear(middle, middle), nn.ReLU())


class LSTMPrompt(EncodedPrompt):
    """P-tuning with an LSTM, in which each virtual token depends on those before and behind it."""

    gain = 4.0

    @staticmethod
    def body(width: int, middle: int) -> nn.Module:
        """A bidirectional LSTM, then the first of two layers that are twice as wide."""
        states = LSTMStates(width, middle, num_layers=LSTM_LAYERS, bidirectional=True)
        return nn.Sequential(states, nn.Linear(2 * middle, 2 * middle), nn.ReLU())
