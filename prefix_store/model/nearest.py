"""Which words a prefix's virtual tokens are nearest to, by what the frozen model itself would put in their place.

A soft prompt is compared with the input embeddings. Of a KV prefix, virtual token p is compared with the keys and
values that real tokens get standing at position p behind the virtual tokens before it, all layers of them. That takes a
run of the model for each word, so the words that are tried are those whose values in the first layer, which depend on
no context, are the nearest. Text that became a prefix and was not trained is found again exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch.nn import functional
from transformers import DynamicCache

from prefix_store.model import apply
from prefix_store.model.frozen import FrozenModel

# Words that are run in each virtual token's place; fewer for very long prefixes, which would take too long.
TRIED, TRIED_AT_LEAST, RUNS = 32, 8, 8192
# Tokens whose mean value stands for what a position alone contributes.
SAMPLE = 128
# Tokens of one forward in the first layer; numbers of the keys that are copied in front of rows of one token.
CHUNK, COPIED = 4096, 1 << 24


@dataclass(frozen=True)
class Words:
    """Nearest first: `ids` and `scores` `[P, K]`; a score is a cosine, 1 where the word is the virtual token."""

    ids: torch.Tensor
    scores: torch.Tensor


@torch.no_grad()
def to_embeds(frozen: FrozenModel, embeds: torch.Tensor, count: int) -> Words:
    """The `count` words whose input embeddings have the greatest cosine with each of `embeds` `[P, E]`.

    By cosine and not by product, for a product is greatest with the longest embedding, whatever the direction.
    """
    table: Any = frozen.model.get_input_embeddings()
    return _nearest(frozen, embeds.to(frozen.device).float(), lambda ids: table(ids).float(), count)


@torch.no_grad()
def to_kv(frozen: FrozenModel, kv: torch.Tensor, count: int) -> Words:
    """The nearest words of each virtual token of `kv` `[L, 2, Hkv, P, D]`; the model must be attached.

    Costs the first layer's projections of the whole vocabulary and a run of at most 32 tokens for each virtual one. A
    word's score is the mean of its cosines over layers, keys and values.
    """
    kv = kv.to(frozen.device).float()
    tried = _likely(frozen, kv, max(count, min(TRIED, max(TRIED_AT_LEAST, RUNS // kv.shape[3]))))
    scores = _scores(frozen, kv, tried)
    best = scores.topk(min(count, scores.shape[1]))
    return Words(tried.gather(1, best.indices), best.values)


def _likely(frozen: FrozenModel, kv: torch.Tensor, count: int) -> torch.Tensor:
    """`[P, count]` words by the first layer's values, less what the position alone contributes to them."""
    length = kv.shape[3]
    spread = torch.linspace(0, frozen.vocabulary_size - 1, SAMPLE, device=frozen.device).long()
    means = torch.stack([_first_values(frozen, spread, position).mean(0) for position in range(length)])
    middle = length // 2
    values = kv[0, 1].transpose(0, 1).flatten(1)
    return _nearest(frozen, values - means, lambda ids: _first_values(frozen, ids, middle) - means[middle], count).ids


def _nearest(
    frozen: FrozenModel, wanted: torch.Tensor, table: Callable[[torch.Tensor], torch.Tensor], count: int
) -> Words:
    """The rows of `table` that have the greatest cosine with each row of `wanted` `[P, N]`, in bounded memory."""
    wanted = functional.normalize(wanted, dim=1)
    ids = torch.zeros(len(wanted), 0, dtype=torch.long, device=wanted.device)
    scores = torch.zeros(len(wanted), 0, device=wanted.device)
    for chunk in _vocabulary(frozen):
        found = wanted @ functional.normalize(table(chunk), dim=1).t()
        ids, scores = torch.cat([ids, chunk.expand(len(wanted), -1)], 1), torch.cat([scores, found], 1)
        best = scores.topk(min(count, scores.shape[1]))
        ids, scores = ids.gather(1, best.indices), best.values
    return Words(ids, scores)


def _vocabulary(frozen: FrozenModel) -> Iterator[torch.Tensor]:
    yield from torch.arange(frozen.vocabulary_size, device=frozen.device).split(CHUNK)


def _scores(frozen: FrozenModel, kv: torch.Tensor, tried: torch.Tensor) -> torch.Tensor:
    """`[P, C]`: how near each word of `tried` `[P, C]` comes to its virtual token, over all layers."""
    _, _, heads, length, dim = kv.shape
    place = torch.arange(length, device=kv.device).repeat_interleave(tried.shape[1])
    rows = max(1, min(256, COPIED // (heads * length * dim)))
    scores = [
        _chunk_scores(frozen, kv, where, words)
        for where, words in zip(place.split(rows), tried.flatten().split(rows), strict=True)
    ]
    return torch.cat(scores).view(tried.shape)


def _chunk_scores(frozen: FrozenModel, kv: torch.Tensor, place: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Scores `[B]` of `words` `[B]`, each standing at its `place` `[B]` behind the virtual tokens before it."""
    length = kv.shape[3]
    before = apply.PrefixRows(
        kv=kv.expand(len(words), *kv.shape),
        valid=torch.arange(length, device=kv.device) < place[:, None],
        offset=place,
        slides=torch.ones_like(place, dtype=torch.bool),
    )
    cosines: list[torch.Tensor] = []

    def compare(seen: apply.Seen) -> None:
        for kind, got in enumerate((seen.key, seen.value)):
            own = kv[seen.layer, kind][:, place].transpose(0, 1)
            cosines.append(functional.cosine_similarity(got[:, :, -1].float().flatten(1), own.flatten(1)))

    apply.observe(frozen, words[:, None], before, compare)
    return torch.stack(cosines).mean(0)


class _FirstLayer(DynamicCache):
    """A cache that ends the run as soon as the first layer has keys and values to keep."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> NoReturn:
        raise _Reached(value_states)


class _Reached(Exception):
    """Carries the first layer's values `[B, Hkv, 1, D]` out of the run."""


def _first_values(frozen: FrozenModel, ids: torch.Tensor, position: int) -> torch.Tensor:
    """`[B, Hkv * D]`: values of the first layer for the tokens `ids` `[B]`, each alone at a position."""
    positions = torch.full_like(ids, position)[:, None]
    try:
        frozen.model.base_model(ids[:, None], position_ids=positions, past_key_values=_FirstLayer(), use_cache=True)
    except _Reached as reached:
        values: torch.Tensor = reached.args[0]
        return values.flatten(1).float()
    raise RuntimeError("the model keeps no keys and values")
