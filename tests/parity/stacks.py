"""Encoder-decoder rows for the parity tests, and the same rows alone, with prefixes concatenated before attention."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.utils import ModelOutput

from prefix_store.geometry import Stack
from prefix_store.model import sites
from prefix_store.model.memory import Memory, recall
from server.scheduler.messages import PrefixPayload
from tests.parity.harness import Case

CONCATENATED = "concatenated"
Stacks = Mapping[Stack, torch.Tensor]


@dataclass(frozen=True)
class Prefix:
    """What stands before a row: keys and values `[L, 2, H, P, D]` by stack, or a soft prompt `[P, E]`, or a memory.

    `offset`: the position of the decoder's first token.
    """

    stacks: Stacks = field(default_factory=dict)
    offset: int = 0
    embeds: torch.Tensor | None = None
    memory: Memory | None = None

    @property
    def length(self) -> int:
        return next((kv.shape[3] for kv in self.stacks.values()), 0)

    def payload(self, digest: str) -> PrefixPayload:
        if self.embeds is not None:
            count = len(self.embeds)
            return PrefixPayload(digest, count, 0, True, self.embeds, is_embeds=True, stacks=())
        own = {stack: self.stacks.get(stack) for stack in Stack}
        found = PrefixPayload(digest, self.length, self.offset, True, own[Stack.SELF], stacks=tuple(self.stacks))
        return replace(found, cross=own[Stack.CROSS], encoder=own[Stack.ENCODER])


def alone(model: PreTrainedModel, case: Case, prefix: Prefix) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and their logits `[new, V]`, recomputed whole for every token."""
    ids, rows = list(case.prompt), []
    for _ in range(case.new):
        rows.append(logits(model, case.source, ids, prefix)[-1])
        ids.append(int(rows[-1].argmax()))
    return ids[len(case.prompt) :], torch.stack(rows)


@torch.inference_mode()
def logits(model: PreTrainedModel, source: Sequence[int], ids: Sequence[int], prefix: Prefix) -> torch.Tensor:
    """Logits `[T, V]` of one row by transformers, all keys and values in one softmax."""
    with behind(model, source, prefix) as states:
        return model(encoder_outputs=states, decoder_input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


@contextmanager
def behind(model: PreTrainedModel, source: Sequence[int], prefix: Prefix) -> Iterator[ModelOutput]:
    """The model attends to this prefix while the block runs; gives what its encoder says of the source."""
    AttentionInterface.register(CONCATENATED, partial(attention, prefix=prefix, whole=model))
    model.set_attn_implementation(CONCATENATED)
    encoder, decoder, inputs = model.get_encoder(), model.get_decoder(), {"input_ids": torch.tensor([list(source)])}
    if prefix.embeds is not None:
        tokens = encoder.embed_tokens(inputs.pop("input_ids")) * getattr(encoder, "embed_scale", 1)
        inputs["inputs_embeds"] = torch.cat([prefix.embeds[None], tokens], 1)
    hooks = []
    if hasattr(decoder, "embed_positions"):
        hooks.append(decoder.embed_positions.register_forward_pre_hook(_moved(prefix.offset), with_kwargs=True))
    try:
        yield encoder(**inputs)
    finally:
        for hook in hooks:
            hook.remove()


def _moved(offset: int):
    def move(_, args, kwargs):
        return args, {**kwargs, "position_ids": kwargs["position_ids"] + offset}

    return move


def attention(module, query, key, value, attention_mask, *, scaling, prefix: Prefix, whole: PreTrainedModel, **_):
    """softmax(q [K_prefix; K]^T * scaling + bias) [V_prefix; V], as the paper says it."""
    assert attention_mask is None
    site = sites.of(module)
    kv = prefix.stacks.get(site.stack)
    length = 0
    if kv is not None:
        length = kv.shape[3]
        rows = (kv[site.layer, part].expand(len(query), -1, -1, -1) for part in (0, 1))
        key, value = (torch.cat(pair, 2) for pair in zip(rows, (key, value), strict=True))
    scores = query @ key.transpose(2, 3) * scaling
    bias = _bias(whole, site.stack, key.shape[2])
    if bias is not None:
        scores = scores + bias[:, :, length:]
    if site.stack is Stack.SELF:
        unseen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(length + 1)
        scores = scores.masked_fill(unseen, -math.inf)
    output = scores.softmax(-1) @ value
    if prefix.memory is not None and site.stack is Stack.SELF:
        output = output + recall((prefix.memory,), site.layer, query)
    return output.transpose(1, 2), None


def _bias(model: PreTrainedModel, stack: Stack, keys: int) -> torch.Tensor | None:
    """T5's own, between all places of a row: the virtual tokens are the first."""
    for module in model.modules():
        if getattr(module, "has_relative_attention_bias", False) and sites.of(module).stack is stack:
            return module.compute_bias(keys, keys)
    return None
