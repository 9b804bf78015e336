from __future__ import annotations

from typing import Any

import torch

from prefix_store.model import apply
from prefix_store.model.apply import PrefixRows
from prefix_store.model.example import Example
from prefix_store.prefix import Method, PrefixManifest, Window
from tests.models import BOS, CONTEXT, EOS, random_kv, tiny_frozen
from trainer import samples, slices

FROZEN = apply.attach(tiny_frozen("llama"))
P = 3
KV = random_kv(FROZEN, P)
MANIFEST = PrefixManifest(
    method=Method.PREFIX,
    geometry=FROZEN.geometry,
    virtual_tokens=P,
    position_offset=P,
    base_digest=FROZEN.digest,
    window=Window.ALWAYS,
)


def made(*given: Any) -> list[dict[str, str]]:
    return slices.done(samples.making(*given))


EXAMPLES = [Example((BOS, 70 + number, 80, 90, 91), 3) for number in range(7)]


def plain(prompt: tuple[int, ...], kv: torch.Tensor | None, most: int) -> list[int]:
    """One prompt alone, a token at a time."""
    prefix = PrefixRows.shared(kv, 1, P, Window.ALWAYS) if kv is not None else None
    ids = list(prompt)
    for _ in range(most):
        batch = torch.tensor([ids])
        ids.append(int(apply.logits(FROZEN, batch, torch.ones_like(batch), prefix)[0, -1].argmax()))
        if ids[-1] == EOS:
            ids.pop()
            break
    return ids[len(prompt) :]


def test_samples_show_a_few_prompts_before_and_after():
    found = made(FROZEN, MANIFEST, {"self.kv": KV}, EXAMPLES)
    assert len(found) == samples.MOST
    decode = FROZEN.tokenizer.decode
    for sample, example in zip(found, EXAMPLES, strict=False):
        prompt = example.ids[:3]
        assert sample["prompt"] == decode(prompt, skip_special_tokens=True)
        assert sample["expected"] == decode([90, 91])
        assert sample["before"] == decode(plain(prompt, None, samples.TOKENS))
        assert sample["after"] == decode(plain(prompt, KV, samples.TOKENS)) != sample["before"]


def test_a_conversation_is_asked_for_its_last_answer_and_a_text_for_what_follows_its_opening():
    chat = Example((BOS, 70, 71, 72, 73, 74), 2, (range(2, 3), range(5, 6)))
    text = Example((BOS, *range(70, 75)), 1)
    found = made(FROZEN, MANIFEST, {"self.kv": KV}, [chat, text])
    decode = FROZEN.tokenizer.decode
    assert [sample["prompt"] for sample in found] == [decode([70, 71, 72, 73]), decode([70, 71])]
    assert [sample["expected"] for sample in found] == [decode([74]), decode([72, 73, 74])]


def test_nothing_to_judge_by_and_prompts_without_room_make_no_samples():
    assert made(FROZEN, MANIFEST, {"self.kv": KV}, []) == []
    long = Example((BOS,) * (CONTEXT - P), CONTEXT - P - 1)
    assert made(FROZEN, MANIFEST, {"self.kv": KV}, [long]) == []


def test_a_slice_is_a_token_or_a_piece_of_a_prompt(monkeypatch):
    monkeypatch.setattr("trainer.answer.PIECE", 4)
    read: list[int] = []
    hook = FROZEN.model.register_forward_pre_hook(
        lambda model, inputs, options: read.append(options["input_ids"].numel()), with_kwargs=True
    )
    long = Example((BOS, *range(70, 79), 90), 10)
    for taken, _ in enumerate(samples.making(FROZEN, MANIFEST, {"self.kv": KV}, [long]), start=1):
        assert len(read) == taken
    hook.remove()
    assert read[:4] == [4, 4, 2, 1]
    assert sum(read) <= 2 * (10 + samples.TOKENS), "no token is run twice"
