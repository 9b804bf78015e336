"""A plain reference for prefixes of encoder-decoder models that shares no code with what it judges.

transformers' own model, one row at a time and without padding: the decoder's prefix is a seeded cache, as PEFT has it,
and an attention function of a few lines joins the other two to the keys and values that it is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AttentionInterface, DynamicCache, EncoderDecoderCache, PreTrainedModel

from prefix_store.geometry import Stack
from prefix_store.model.rows import StackRows
from tests.models import tiny_model

NAME = "tests_concatenation"
Kvs = Mapping[Stack, torch.Tensor]


def rows_of(kvs: Sequence[Kvs], offsets: Sequence[int]) -> StackRows:
    """A batch, one prefix a row."""
    parts = [
        StackRows.shared(kv, 1, offset) if kv else StackRows.bare(1, torch.device("cpu"))
        for kv, offset in zip(kvs, offsets, strict=True)
    ]
    return StackRows.joined(parts)


def padded(rows: Sequence[Sequence[int]], *, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask; what stands on the padding is a real token's id, which nothing may look at."""
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), 7), torch.zeros(len(rows), longest, dtype=torch.long)
    for row, own in enumerate(rows):
        place = slice(longest - len(own), None) if left else slice(len(own))
        ids[row, place], mask[row, place] = torch.tensor(list(own)), 1
    return ids, mask


def alone(family: str, source: Sequence[int], target: Sequence[int], kvs: Kvs, offset: int) -> torch.Tensor:
    """Logits `[T, V]` of one row."""
    model = tiny_model(family)
    model.set_attn_implementation(NAME)
    _give(model, kvs)
    cache: Any = EncoderDecoderCache(DynamicCache(), DynamicCache())
    if Stack.SELF in kvs:
        seeded = kvs[Stack.SELF]
        for layer in range(len(seeded)):
            cache.self_attention_cache.update(seeded[layer, 0][None], seeded[layer, 1][None], layer)
    seen = kvs[Stack.SELF].shape[3] if Stack.SELF in kvs else 0
    _shift(model, offset - seen)
    with torch.no_grad():
        found = model(
            input_ids=torch.tensor([list(source)]),
            decoder_input_ids=torch.tensor([list(target)]),
            past_key_values=cache,
            use_cache=True,
        )
    return found.logits[0]


def _give(model: PreTrainedModel, kvs: Kvs) -> None:
    """Hangs each layer's part on its attention module, by the names that the families have for them."""
    encoder = [module for name, module in model.named_modules() if ".encoder." in f".{name}" and _is_attention(module)]
    cross = [module for name, module in model.named_modules() if name.endswith(("encoder_attn", "EncDecAttention"))]
    for stack, modules in ((Stack.ENCODER, encoder), (Stack.CROSS, cross)):
        for layer, kv in enumerate(kvs.get(stack, ())):
            modules[layer].given = kv
            modules[layer].table = next((own for own in modules if hasattr(own, "relative_attention_bias")), None)


def _is_attention(module: torch.nn.Module) -> bool:
    return hasattr(module, "layer_idx") and hasattr(module, "scaling")


def _shift(model: PreTrainedModel, by: int) -> None:
    """Moves the decoder's positions from where the cache puts them."""
    table = getattr(model.get_decoder(), "embed_positions", None)
    if table is not None:
        plain = table.forward
        table.forward = lambda ids, past, position_ids: plain(ids, past, position_ids=position_ids + by)


def _concatenated(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    position_bias: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    tokens = key.shape[2]
    if (given := getattr(module, "given", None)) is not None:
        key, value = torch.cat([given[None, 0], key], dim=2), torch.cat([given[None, 1], value], dim=2)
        before = given.shape[2]
        if module.table is not None:
            position_bias = module.table.compute_bias(before + tokens, before + tokens)[:, :, before:]
        elif position_bias is not None:
            position_bias = torch.nn.functional.pad(position_bias, (before, 0))
    scores = query @ key.transpose(2, 3) * scaling
    if position_bias is not None:
        scores = scores + position_bias
    if module.is_causal:
        past = key.shape[2] - query.shape[2]
        scores = scores + torch.full(scores.shape[2:], -torch.inf).triu(1 + past)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register(NAME, _concatenated)
