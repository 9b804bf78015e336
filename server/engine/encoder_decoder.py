"""An encoder-decoder model, bound to packed steps: the encoders of rows that begin run in the step they begin in.

In that step the cross-attention is handed the encoder's output, and what it makes of it goes into the source's slots;
in later ones it is handed a single row of nothing, which costs nothing and goes nowhere. So each row's source is read
once, whatever the family calls its projections.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutput

from prefix_store.geometry import Stack
from prefix_store.model import modules, sites
from prefix_store.model.frozen import FrozenModel
from server.engine.attention import StackStep, StepContext
from server.engine.batch import Batch, Sources
from server.engine.int8_linear import Int8Linear
from server.engine.kv_pool import KVPool
from server.engine.linear import PackedLinear
from server.engine.model_runner import ModelRunner

POSITIONS = "embed_positions"
PROJECTIONS = (PackedLinear, Int8Linear, torch.nn.Linear)


class Given(torch.nn.Module):
    """Positional embeddings that count from 0 by themselves, in `plain`, and are told the positions `[T]` here."""

    def __init__(self, plain: torch.nn.Module) -> None:
        super().__init__()
        modules.keep_plain(self, plain)
        self.positions = torch.zeros(0, dtype=torch.long)

    def forward(self, *shape: Any, **options: Any) -> torch.Tensor:
        """`[1, T, E]` or `[T, E]`."""
        embedded: torch.Tensor = modules.plain_of(self)(*shape, **{**options, "position_ids": self.positions})  # type: ignore[misc]
        return embedded


class Selected(torch.nn.Module):
    """The language-model head `plain`, for the packed places `selected` `[N]` alone."""

    def __init__(self, plain: torch.nn.Module) -> None:
        super().__init__()
        modules.keep_plain(self, plain)
        self.selected = torch.zeros(0, dtype=torch.long)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[1, T, E]` to `[1, N, V]`."""
        logits: torch.Tensor = modules.plain_of(self)(x[:, self.selected])  # type: ignore[misc]
        return logits


class Idle(torch.nn.Module):
    """A layer `plain` of a cross-attention, which multiplies the row of `nothing` `[1, 1, E]` only once."""

    def __init__(self, plain: torch.nn.Module, nothing: torch.Tensor) -> None:
        super().__init__()
        modules.keep_plain(self, plain)
        self.nothing = nothing
        self._made: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`."""
        if x is self.nothing and self._made is not None:
            return self._made
        made: torch.Tensor = modules.plain_of(self)(x)  # type: ignore[misc]
        if x is self.nothing:
            self._made = made
        return made


class EncoderDecoderRunner(ModelRunner):
    """A model runner whose rows have sources."""

    def __init__(self, frozen: FrozenModel, pool: KVPool, backend: str, *, int8: bool = False) -> None:
        super().__init__(frozen, pool, backend, int8=int8)
        self.windows = frozenset({0})
        model: Any = frozen.model
        self._encoder = model.get_encoder()
        self._source_positions = _given(self._encoder)
        self._positions = _given(model.get_decoder())
        self._biases = _biases(model)
        self._head = Selected(model.get_output_embeddings())
        modules.replace(model, lambda module: self._head if module is modules.plain_of(self._head) else None)
        self._nothing = torch.zeros(1, 1, frozen.geometry.hidden_size, dtype=frozen.dtype, device=frozen.device)
        _idle(model, self._nothing)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        """As `ModelRunner.forward`; the sources of rows that begin are read, too."""
        sources = batch.sources
        assert sources is not None
        step = StepContext(self._steps(batch, sources), self.backend, self.frozen.is_relative)
        states = self._encode(sources, step) if sources.token_ids.numel() else self._nothing
        if self._positions is not None:
            self._positions.positions = batch.positions[0]
        self._head.selected = batch.selected
        output = self.frozen.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            decoder_input_ids=batch.token_ids,
            use_cache=False,
            antefix=step,
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _encode(self, sources: Sources, step: StepContext) -> torch.Tensor:
        """`[1, S, E]`: what the encoder makes of all sources at once."""
        if self._source_positions is not None:
            self._source_positions.positions = sources.positions[0]
        inputs = {"inputs_embeds": self._embeds(sources)} if sources.prompts else {"input_ids": sources.token_ids}
        states: torch.Tensor = self._encoder(**inputs, antefix=step).last_hidden_state
        return states

    def _embeds(self, sources: Sources) -> torch.Tensor:
        """Soft prompts among the embeddings of tokens, which are those that the encoder adds its positions to."""
        embeds = self.frozen.source_embeds(sources.token_ids)
        for first, prompt in sources.prompts:
            embeds[0, first : first + len(prompt)] = prompt
        return embeds

    def _steps(self, batch: Batch, sources: Sources) -> dict[Stack, StackStep]:
        own = StackStep(
            *self.pool.of(Stack.SELF), batch.slots, batch.work, batch.memories, self._biases.get(Stack.SELF)
        )
        cross = StackStep(*self.pool.of(Stack.CROSS), sources.slots, {0: sources.cross})
        encoder = StackStep(
            *self.pool.of(Stack.ENCODER), sources.slots, {0: sources.work}, bias=self._biases.get(Stack.ENCODER)
        )
        return {Stack.SELF: own, Stack.CROSS: cross, Stack.ENCODER: encoder}


def _given(stack: Any) -> Given | None:
    """Has a stack told its positions, if it has embeddings of them."""
    if not hasattr(stack, POSITIONS):
        return None
    given = Given(getattr(stack, POSITIONS))
    setattr(stack, POSITIONS, given)
    return given


def _idle(model: torch.nn.Module, nothing: torch.Tensor) -> None:
    """Of a cross-attention's layers those that read sources are told from others by what they are given."""
    crossing = [module for module in model.modules() if sites.stack_of(module) is Stack.CROSS]
    layers = {layer for module in crossing for layer in module.children() if isinstance(layer, PROJECTIONS)}
    modules.replace(model, lambda layer: Idle(layer, nothing) if layer in layers else None)


def _biases(model: torch.nn.Module) -> dict[Stack, torch.Tensor]:
    """What T5's stacks add to scores, by stack: `plain.relative`'s table. The model makes it itself no more.

    Beyond `relative_attention_max_distance` all distances are one, so the table is whole.
    """
    biases = {}
    for module in model.modules():
        if not hasattr(module, "relative_attention_max_distance"):
            continue
        attention: Any = module
        if attention.has_relative_attention_bias:
            reach = attention.relative_attention_max_distance
            table = attention.compute_bias(1, 2 * reach + 1, past_seen_tokens=reach)[0, :, 0]
            biases[sites.of(module).stack] = table.detach().float().contiguous()
        attention.forward = MethodType(_without_bias, attention)
    return biases


def _without_bias(attention: Any, *states: Any, **options: Any) -> Any:
    """An attention's own forward, spared the bias between all packed tokens; `modules.make_plain` undoes it."""
    return type(attention).forward(attention, *states, **{**options, "position_bias": states[0].new_zeros(1)})
