"""From hidden states to logits, and to sums over logits that are never all there at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

# Of logits in float32: what is made, read and let go of piece by piece stays in a processor's cache.
CHUNK_BYTES = 16 << 20

# The sum over some of a group's places of what is minimised, from their logits `[c, V]`.
Objective = Callable[[torch.Tensor, slice], torch.Tensor]


class Head:
    """A causal model from its last hidden states on: its own `forward` around a body that hands on what it is given.

    So whatever the family does to logits after the last product is done here too.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Any = copy.copy(model)
        self._model.__dict__["_modules"] = {**model._modules, model.base_model_prefix: _Body()}
        self.vocabulary_size: int = model.config.get_text_config().vocab_size

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[C, V]` of hidden states `[C, E]`."""
        logits: torch.Tensor = self._model(inputs_embeds=hidden[None], use_cache=False).logits
        return logits[0]

    def sums(self, hidden: torch.Tensor, lengths: Sequence[int], objectives: Sequence[Objective]) -> torch.Tensor:
        """`[G]`: the sum of each objective over its own part of hidden states `[C, E]`, float32.

        `lengths` `[G]` add up to C. Differentiable in the hidden states, and in nothing that an objective knows.
        """
        rows = max(1, CHUNK_BYTES // (4 * self.vocabulary_size))
        sums: torch.Tensor = _Sums.apply(hidden, self, tuple(lengths), tuple(objectives), rows)
        return sums


class _Body(torch.nn.Module):
    """In the place of a model's body; OPT asks for its `decoder`."""

    def forward(
        self, input_ids: None = None, *, inputs_embeds: torch.Tensor, **others: Any
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=inputs_embeds)

    @property
    def decoder(self) -> _Body:
        return self


class _Sums(torch.autograd.Function):
    """Makes the gradient of a chunk at once, so that its logits are needed only once and then no more."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: Head,
        lengths: Sequence[int],
        objectives: Sequence[Objective],
        rows: int,
    ) -> torch.Tensor:
        is_needed = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if is_needed else None
        sums = torch.zeros(len(lengths), device=hidden.device)
        for first in range(0, len(hidden), rows):
            chunk = hidden[first : first + rows].detach().requires_grad_(is_needed)
            with torch.set_grad_enabled(is_needed):
                logits, values = head(chunk), []
                for number, here, there in _parts(lengths, first, first + len(chunk)):
                    values.append(objectives[number](logits[here], there))
                    sums[number] += values[-1].detach()
                if gradient is not None:
                    (gradient[first : first + rows],) = torch.autograd.grad(torch.stack(values).sum(), chunk)
        ctx.lengths, ctx.gradient = lengths, gradient
        return sums

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        lengths = torch.tensor(ctx.lengths, device=gradients[0].device)
        factors = gradients[0].repeat_interleave(lengths)[:, None]
        return (ctx.gradient * factors).to(ctx.gradient.dtype), None, None, None, None


def _parts(lengths: Sequence[int], first: int, last: int) -> Iterator[tuple[int, slice, slice]]:
    """Whose the places from `first` to `last` are: a number, where among these places, where among its own."""
    start = 0
    for number, length in enumerate(lengths):
        low, high = max(first, start), min(last, start + length)
        if low < high:
            yield number, slice(low - first, high - first), slice(low - start, high - start)
        start += length
