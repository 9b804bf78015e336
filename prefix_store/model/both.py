"""What a prefix means to an encoder-decoder model: the plain, differentiable reference, as `apply.py` is for others.

Keys and values of a prefix stand in three places, each of its own: in front of the encoder's own, in front of what the
cross-attention makes of the encoder's states, and in front of the decoder's own (Li & Liang 2021, section 4). A soft
prompt stands in front of the source instead. It cannot become keys and values there: the encoder looks both ways, so
what its layers make of the virtual tokens depends on the source.

The source's tokens stand at positions 0 and on, behind a soft prompt where there is one, and the decoder's at the row's
own offset and on. T5 has relative positions alone: virtual tokens stand right before the first real one of their stack,
whatever the offset; its cross-attention has no positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from prefix_store.geometry import Stack
from prefix_store.model import sites
from prefix_store.model.attention import NAME, Ahead, Forward, Seen
from prefix_store.model.frozen import FrozenModel
from prefix_store.model.rows import PrefixRows, StackRows


@dataclass
class Read:
    """What rows have been through: the encoder's states, and the decoder's cache of its own and of these."""

    cache: EncoderDecoderCache
    states: torch.Tensor | None = None

    @classmethod
    def nothing(cls) -> Read:
        """Before the first forward."""
        return cls(EncoderDecoderCache(DynamicCache(), DynamicCache()))


def logits(
    frozen: FrozenModel,
    source: torch.Tensor,
    source_mask: torch.Tensor,
    target: torch.Tensor,
    target_mask: torch.Tensor,
    prefixes: StackRows | None,
    observer: Callable[[Seen], None] | None = None,
    read: Read | None = None,
) -> torch.Tensor:
    """`[B, T, V]` for `target` `[B, T]`, which begins with the start token, over `source` `[B, S]`; has gradients.

    Both are padded on either side where their masks are 0. The observer is shown every attention. Not for two threads
    at once: positions are told to the model by hooks. `read`: what these rows have been through before, to which this
    forward is added; `target_mask` is then of all their targets' tokens.
    """
    check_attached(frozen)
    prefixes = prefixes or StackRows.bare(len(source), frozen.device)
    inputs, source_mask = _inputs(frozen, source, source_mask, prefixes)
    source_index, target_index = real_index(source_mask), real_index(target_mask)[:, -target.shape[1] :]
    if read is not None and read.states is not None:
        inputs = {"encoder_outputs": BaseModelOutput(read.states)}
    with _positions(frozen, source_index, prefixes.offset[:, None] + target_index):
        output = frozen.model(
            **inputs,
            attention_mask=source_mask,
            decoder_input_ids=target,
            decoder_attention_mask=target_mask,
            past_key_values=read.cache if read is not None else None,
            use_cache=read is not None,
            prefix=Forward(_ahead(frozen, prefixes, source_index, target_index), observer),
        )
    if read is not None:
        read.states = output.encoder_last_hidden_state
    result: torch.Tensor = output.logits
    return result


@torch.no_grad()
def prefill(frozen: FrozenModel, ids: Sequence[int]) -> dict[Stack, torch.Tensor]:
    """Canonical KV `[L, 2, H, P, D]` in float32 of P real tokens, by stack.

    The encoder reads them, and the decoder, having read that, writes them behind its start token, all but the last.
    """
    seen: dict[Stack, list[torch.Tensor]] = {stack: [] for stack in Stack}
    source = torch.tensor([list(ids)], device=frozen.device)
    target = torch.tensor([[frozen.start_id, *ids[:-1]]], device=frozen.device)

    def note(one: Seen) -> None:
        seen[one.stack].append(torch.stack([one.key[0], one.value[0]]).float())

    logits(frozen, source, torch.ones_like(source), target, torch.ones_like(target), None, note)
    return {stack: torch.stack(layers) for stack, layers in seen.items()}


def check_attached(frozen: FrozenModel) -> None:
    """Raises RuntimeError unless the model's attention is the reference's."""
    if frozen.model.config._attn_implementation != NAME:
        raise RuntimeError("attach the frozen model to the reference first")


@torch.enable_grad()
def deaf_layers(frozen: FrozenModel) -> list[str]:
    """Stacks and layers in which a prefix has no influence on the logits; the gradient tells."""
    generator = torch.Generator().manual_seed(0)
    kvs = {}
    for stack in Stack:
        layers, two, heads, dim = frozen.geometry.kv_shape_of(stack)
        kvs[stack] = torch.randn(layers, two, heads, 2, dim, generator=generator).to(frozen.device).requires_grad_()
    ids = torch.zeros(1, 2, dtype=torch.long, device=frozen.device)
    ones = torch.ones_like(ids)
    output = logits(frozen, ids, ones, ids, ones, StackRows.shared(kvs, 1, 2))
    if not output.requires_grad:
        return [str(stack) for stack in Stack]
    gradients = torch.autograd.grad(output.float().logsumexp(-1).sum(), list(kvs.values()), allow_unused=True)
    return [
        f"{stack} {layer}"
        for stack, gradient in zip(kvs, gradients, strict=True)
        for layer in range(len(kvs[stack]))
        if gradient is None or not gradient[layer].any()
    ]


def _inputs(
    frozen: FrozenModel, source: torch.Tensor, mask: torch.Tensor, prefixes: StackRows
) -> tuple[dict[str, Any], torch.Tensor]:
    """What the encoder reads, and which of it is real."""
    if prefixes.embeds is None or prefixes.valid is None:
        return {"input_ids": source}, mask
    words = frozen.source_embeds(source)
    embeds = torch.cat([prefixes.embeds.to(words.dtype), words], dim=1)
    return {"inputs_embeds": embeds}, torch.cat([prefixes.valid.to(mask.dtype), mask], dim=1)


def real_index(mask: torch.Tensor) -> torch.Tensor:
    """`[B, T]`: how many real tokens stand before each."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def _ahead(
    frozen: FrozenModel, prefixes: StackRows, source_index: torch.Tensor, target_index: torch.Tensor
) -> dict[Stack, Ahead]:
    biases = _biases(frozen)
    found = {}
    for stack, rows in prefixes.stacks.items():
        real_index = source_index if stack is Stack.ENCODER else target_index
        bias = _bias(biases[stack], rows, real_index) if stack in biases else None
        found[stack] = Ahead(rows, real_index, bias)
    return found


def _biases(frozen: FrozenModel) -> dict[Stack, Any]:
    """T5's attentions that own a table of relative positions, one for each stack that has one."""
    modules = frozen.model.modules()
    return {sites.of(module).stack: module for module in modules if hasattr(module, "relative_attention_bias")}


def _bias(module: Any, rows: PrefixRows, real_index: torch.Tensor) -> torch.Tensor:
    """`[B, Hq, T, P]`: what T5 adds to the scores of tokens at 0 to P - 1, seen from real ones at P and on."""
    longest, back = rows.kv.shape[4], rows.back[:, None]
    # of slots that end where a real token with index 0 begins
    table = module.compute_bias(int(real_index.max()) + 1, longest, past_seen_tokens=longest)[0]
    slots = (torch.arange(longest, device=back.device) + longest - back).clamp(max=longest - 1)
    return table[:, real_index[:, :, None], slots[:, None, :]].transpose(0, 1)


@contextmanager
def _positions(frozen: FrozenModel, source: torch.Tensor, target: torch.Tensor) -> Iterator[None]:
    """Makes the model's tables of positions give these, `[B, S]` and `[B, T]`: BART and its kin ask nobody."""
    hooks = []
    for part, positions in ((frozen.model.get_encoder(), source), (frozen.model.get_decoder(), target)):
        if (table := getattr(part, "embed_positions", None)) is not None:
            hooks += [
                table.register_forward_pre_hook(_asking(positions), with_kwargs=True),
                table.register_forward_hook(_answering(positions)),
            ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _asking(positions: torch.Tensor) -> Any:
    """A hook: the tables take one row of positions for all."""
    return lambda module, inputs, options: (inputs, {**options, "position_ids": positions.flatten()})


def _answering(positions: torch.Tensor) -> Any:
    return lambda module, inputs, output: output.view(*positions.shape, -1)
