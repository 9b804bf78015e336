"""What the model says to a few validation prompts, with the new prefix and without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from prefix_store.model import stored
from prefix_store.model.example import Example
from prefix_store.model.frozen import FrozenModel
from prefix_store.model.rows import Rows
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
    asked = [(opening, answer) for opening, answer in map(_divided, examples) if opening.longest <= room][:MOST]
    if not asked:
        return []
    prompts, sources = [opening.ids for opening, _ in asked], [opening.source for opening, _ in asked]
    prefixes = stored.repeated(frozen, manifest, tensors, len(prompts))
    before = greedy(frozen, None, prompts, TOKENS, check, sources)
    after = greedy(frozen, prefixes, prompts, TOKENS, check, sources)
    return [
        {
            "prompt": _text(frozen, opening.source or opening.ids),
            "expected": _text(frozen, answer[:TOKENS]),
            "before": _text(frozen, plain),
            "after": _text(frozen, tuned),
        }
        for (opening, answer), plain, tuned in zip(asked, before, after, strict=True)
    ]


@torch.no_grad()
def greedy(
    frozen: FrozenModel,
    prefixes: Rows | None,
    prompts: Sequence[Sequence[int]],
    most: int,
    check: Callable[[], None] = lambda: None,
    sources: Sequence[Sequence[int]] = (),
) -> list[list[int]]:
    """The likeliest token after each prompt, again and again, up to the first that ends a text, or `most`.

    `sources`: what an encoder reads beside each; the prompt is then what the decoder begins with.
    """
    texts, read = [list(prompt) for prompt in prompts], [tuple(ids) for ids in sources or [()] * len(prompts)]
    for _ in range(most):
        check()
        # the last token only makes a place that is predicted; nothing looks at it
        rows = [Example((*ids, 0), len(ids), source=source) for ids, source in zip(texts, read, strict=True)]
        group = Group(prefixes, rows)
        (logits,) = forward.logits(frozen, [group])
        for ids, token in zip(texts, logits.argmax(-1).tolist(), strict=True):
            ids.append(token)
    answers = [ids[len(prompt) :] for ids, prompt in zip(texts, prompts, strict=True)]
    return [_until_end(ids, frozen.end_ids) for ids in answers]


def _divided(example: Example) -> tuple[Example, tuple[int, ...]]:
    """A prompt and what followed it: the last answer of a conversation, and a text after its opening."""
    start = example.answers[-1].start if example.answers else example.prompt_length
    if start == 1 and not example.source:
        start = min(OPENING, max(1, len(example.ids) // 2))
    return Example(example.ids[:start], start, source=example.source), example.ids[start:]


def _until_end(ids: list[int], ends: frozenset[int]) -> list[int]:
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


def _text(frozen: FrozenModel, ids: Sequence[int]) -> str:
    text: str = frozen.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text
