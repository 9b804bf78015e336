"""Text to token ids: the one function that training and serving share."""

from __future__ import annotations

from typing import Any

from prefix_store.errors import InvalidRequest


def render(text: str, template: str | None) -> str:
    """A prefix's own template applied to a text prompt."""
    return template.replace("{prompt}", text) if template is not None else text


def encode(tokenizer: Any, text: str) -> list[int]:
    """Encodes with the tokenizer's own defaults; an empty text becomes BOS.

    Raises InvalidRequest for an empty text where the tokenizer has no BOS: nothing would be left to predict from.
    """
    ids: list[int] = tokenizer(text, verbose=False).input_ids
    if ids:
        return ids
    if tokenizer.bos_token_id is None:
        raise InvalidRequest("the prompt is empty and this model has no BOS token to stand for it", param="prompt")
    return [tokenizer.bos_token_id]


def encode_completion(tokenizer: Any, text: str) -> list[int]:
    """Encodes what follows a prompt: no special tokens in front, EOS at the end where there is one."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids + ([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])
