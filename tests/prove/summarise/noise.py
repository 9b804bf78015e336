"""What BART (Lewis et al. 2020, arXiv 1910.13461) does to a text before it is to be told back: two of its noises.

Text infilling replaces spans, whose lengths are drawn from a Poisson distribution, by one mask each; a span of no
tokens puts in a mask. Sentence permutation puts sentences in any order. Knows token ids and nothing of models.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

END = re.compile(r"[.!?]+[\"'”’)]*\s*$|\n")


def sentence_ends(tokenizer: Any) -> np.ndarray:
    """`[V]`: which tokens a sentence may end with."""
    texts = (tokenizer.decode([token]) for token in range(len(tokenizer)))
    special = set(tokenizer.all_special_ids)
    return np.array([token not in special and END.search(text) is not None for token, text in enumerate(texts)])


def is_last(ids: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """`[T]`: which places are the last of a sentence; of several ends in a row it is the last one."""
    ended = ends[ids]
    return ended & ~np.append(ended[1:], False)


def permute(ids: np.ndarray, ends: np.ndarray, draws: np.random.Generator) -> np.ndarray:
    """The sentences of `[T]` in an order that is drawn; what is cut off at either end counts as one."""
    sentences = np.split(ids, np.flatnonzero(is_last(ids, ends)[:-1]) + 1)
    return np.concatenate([sentences[number] for number in draws.permutation(len(sentences))])


def spans(length: int, share: float, mean: float, draws: np.random.Generator) -> list[tuple[int, int]]:
    """Where to mask: (first, how many), in order, disjoint and never side by side; together `share` of the tokens.

    Of the tokens that stay, any gap between two may hold a span, and all choices of gaps are equally likely.
    """
    count = round(share * length)
    sizes: list[int] = []
    while (left := count - sum(sizes)) > 0:
        sizes.append(min(left, int(draws.poisson(mean))))
    gaps = np.sort(draws.choice(length - count + 1, size=len(sizes), replace=False))
    before = np.cumsum([0, *sizes[:-1]])
    return [(int(gap + hidden), size) for gap, hidden, size in zip(gaps, before, sizes, strict=False)]


def infill(ids: np.ndarray, mask: int, share: float, mean: float, draws: np.random.Generator) -> np.ndarray:
    """`[T]` with one mask in place of each of `spans`."""
    pieces, taken = [], 0
    for first, size in spans(len(ids), share, mean, draws):
        pieces += [ids[taken:first], np.array([mask], dtype=ids.dtype)]
        taken = first + size
    return np.concatenate([*pieces, ids[taken:]])
