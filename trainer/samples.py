"""What the model says to a few validation prompts, with the new prefix and without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from prefix_store.model import stored
from prefix_store.model.apply import PrefixRows
from prefix_store.model.example import Example
from prefix_store.model.frozen import FrozenModel
from prefix_store.prefix import PrefixManifest
from prefix_store.tensors import PrefixTensors
from trainer import forward
from trainer.forward import Group

MOST, TOKENS = 5, 32
LONGEST = 512  # tokens of a prompt; each answer reads it again for every token
OPENING = 16  # tokens of an example without a prompt that stand for one


def make(
    frozen: FrozenModel,
    manifest: PrefixManifest,
    tensors: PrefixTensors,
    examples: Sequence[Example],
    check: Callable[[], None] = lambda: None,
) -> list[dict[str, str]]:
    """`{prompt, expected, before, after}` for the first of the examples: greedy, and short.

    Every token takes a forward over all before it; `check` is called before each, and stops it by raising.
    """
    room = min(LONGEST, frozen.context_length - manifest.virtual_tokens - TOKENS)
    asked = [(prompt, answer) for prompt, answer in map(_divided, examples) if len(prompt) <= room][:MOST]
    if not asked:
        return []
    prompts = [prompt for prompt, _ in asked]
    row = stored.rows_of(frozen, manifest, tensors, stored.kv_of(frozen, manifest, tensors))
    before = greedy(frozen, None, prompts, TOKENS, check)
    after = greedy(frozen, _repeated(row, len(prompts)), prompts, TOKENS, check)
    return [
        {
            "prompt": _text(frozen, prompt),
            "expected": _text(frozen, answer[:TOKENS]),
            "before": _text(frozen, plain),
            "after": _text(frozen, tuned),
        }
        for (prompt, answer), plain, tuned in zip(asked, before, after, strict=True)
    ]


@torch.no_grad()
def greedy(
    frozen: FrozenModel,
    prefixes: PrefixRows | None,
    prompts: Sequence[Sequence[int]],
    most: int,
    check: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """The likeliest token after each prompt, again and again, up to the first that ends a text, or `most`."""
    texts = [list(prompt) for prompt in prompts]
    for _ in range(most):
        check()
        # the last token only makes a place that is predicted; nothing looks at it
        group = Group(prefixes, [Example((*ids, 0), len(ids)) for ids in texts])
        (logits,) = forward.logits(frozen, [group])
        for ids, token in zip(texts, logits.argmax(-1).tolist(), strict=True):
            ids.append(token)
    answers = [ids[len(prompt) :] for ids, prompt in zip(texts, prompts, strict=True)]
    return [_until_end(ids, frozen.end_ids) for ids in answers]


def _divided(example: Example) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A prompt and what followed it: the last answer of a conversation, and a text after its opening."""
    start = example.answers[-1].start if example.answers else example.prompt_length
    if start == 1:
        start = min(OPENING, max(1, len(example.ids) // 2))
    return example.ids[:start], example.ids[start:]


def _until_end(ids: list[int], ends: frozenset[int]) -> list[int]:
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


def _text(frozen: FrozenModel, ids: Sequence[int]) -> str:
    text: str = frozen.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def _repeated(row: PrefixRows, count: int) -> PrefixRows:
    return PrefixRows(
        kv=row.kv.expand(count, *row.kv.shape[1:]),
        valid=row.valid.expand(count, -1),
        offset=row.offset.expand(count),
        slides=row.slides.expand(count),
        memories=row.memories * count,
    )
