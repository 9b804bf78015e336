"""Text to token ids: the one function that training and serving share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from prefix_store.errors import ChatTemplateMissing, InvalidRequest


def render(text: str, template: str | None) -> str:
    """A prefix's own template applied to a text prompt."""
    return template.replace("{prompt}", text) if template is not None else text


def check_chat_template(tokenizer: Any, template: str | None, param: str = "messages") -> None:
    """Raises ChatTemplateMissing unless there is a form for messages: the one that is given, or the tokenizer's own."""
    if template is None and not tokenizer.chat_template:
        raise ChatTemplateMissing(
            "this model has no chat template: use prompts, or start the server with ANTEFIX_CHAT_TEMPLATE", param=param
        )


def render_chat(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], template: str | None = None, *, answered: bool = False
) -> str:
    """Messages in a chat template, up to where the answer begins; by default the template is the tokenizer's own.

    `answered`: the last message is the answer, and the text ends behind it. Raises ChatTemplateMissing, and
    InvalidRequest for messages that the template does not take.
    """
    check_chat_template(tokenizer, template)
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), chat_template=template, add_generation_prompt=not answered, tokenize=False
        )
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # a template is a program, which may refuse messages or stumble over them
        raise InvalidRequest(f"the chat template does not take these messages: {error}", param="messages") from None
    return text


def encode(tokenizer: Any, text: str, *, special_tokens: bool = True) -> list[int]:
    """Encodes with the tokenizer's own defaults; an empty text becomes BOS.

    `special_tokens` False puts none in front, for a text that has them already, as a chat template's does. Raises
    InvalidRequest for an empty text where the tokenizer has no BOS: nothing would be left to predict from.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=special_tokens, verbose=False).input_ids
    if ids:
        return ids
    if tokenizer.bos_token_id is None:
        raise InvalidRequest("the prompt is empty and this model has no BOS token to stand for it", param="prompt")
    return [tokenizer.bos_token_id]


def encode_completion(tokenizer: Any, text: str) -> list[int]:
    """Encodes what follows a prompt: no special tokens in front, EOS at the end where there is one."""
    return ended(tokenizer, encode_answer(tokenizer, text))


def encode_answer(tokenizer: Any, text: str) -> list[int]:
    """Encodes what a model is to write, without special tokens, with the pieces of that side.

    Not for two threads at once where the sides differ: such a tokenizer is turned to the other side and back.
    """
    # of tokenizers with one set of pieces this would only change, in place, special tokens that are not asked for
    side = {"text_target": text} if has_two_sides(tokenizer) else {"text": text}
    ids: list[int] = tokenizer(**side, add_special_tokens=False, verbose=False).input_ids
    return ids


def has_two_sides(tokenizer: Any) -> bool:
    """Whether answers are cut into other pieces than prompts are (Marian)."""
    return hasattr(tokenizer, "spm_target")


def ended(tokenizer: Any, ids: list[int]) -> list[int]:
    """Ids with EOS behind them, where there is one."""
    return ids + ([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])
