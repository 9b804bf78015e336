"""What the model says to a few validation prompts, with the new prefix and without it."""

from __future__ import annotations

from collections.abc import Sequence

from prefix_store.model import stored
from prefix_store.model.example import Example
from prefix_store.model.frozen import FrozenModel
from prefix_store.prefix import PrefixManifest
from prefix_store.tensors import PrefixTensors
from trainer.answer import answering
from trainer.slices import Sliced

MOST, TOKENS = 5, 32
LONGEST = 512  # tokens of a prompt
OPENING = 16  # tokens of an example without a prompt that stand for one


def making(
    frozen: FrozenModel, manifest: PrefixManifest, tensors: PrefixTensors, examples: Sequence[Example]
) -> Sliced[list[dict[str, str]]]:
    """`{prompt, expected, before, after}` for the first of the examples: greedy, and short."""
    room = min(LONGEST, frozen.context_length - manifest.virtual_tokens - TOKENS)
    asked = [(opening, answer) for opening, answer in map(_divided, examples) if opening.longest <= room][:MOST]
    if not asked:
        return []
    prefix, made = stored.repeated(frozen, manifest, tensors, 1), []
    for opening, answer in asked:
        before = yield from answering(frozen, None, opening, TOKENS)
        after = yield from answering(frozen, prefix, opening, TOKENS)
        texts = {"prompt": opening.source or opening.ids, "expected": answer[:TOKENS], "before": before, "after": after}
        made.append({name: _text(frozen, ids) for name, ids in texts.items()})
    return made


def _divided(example: Example) -> tuple[Example, tuple[int, ...]]:
    """A prompt and what followed it: the last answer of a conversation, and a text after its opening."""
    start = example.answers[-1].start if example.answers else example.prompt_length
    if start == 1 and not example.source:
        start = min(OPENING, max(1, len(example.ids) // 2))
    return Example(example.ids[:start], start, source=example.source), example.ids[start:]


def _text(frozen: FrozenModel, ids: Sequence[int]) -> str:
    text: str = frozen.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text
