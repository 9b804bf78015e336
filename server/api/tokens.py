"""/tokenize, /detokenize and /tokenizer_info, for clients that count, cut or score tokens themselves."""

from __future__ import annotations

from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request

from prefix_store.errors import InvalidRequest
from prefix_store.model.prompt import render_chat
from server.api import model_names, prompts, schemas
from server.api.auth import Caller, Calling
from server.api.openai_schemas import DetokenizeBody, TokenizeBody
from server.api.services import Services, Serving

# A document to be scored may be longer than any prompt; it is still one text at a time, for all callers.
LONGEST_TEXT = 1 << 20
router = APIRouter()


@router.post("/tokenize")
async def tokenize(request: Request, services: Serving, caller: Calling) -> dict[str, Any]:
    """The ids of a text or of messages; a prefix's template is no part of them."""
    body = await schemas.read(request, TokenizeBody)
    await _check_model(body.model, services, caller)
    ids, texts = await to_thread.run_sync(_encode, body, services, limiter=services.tokenizing)
    shown = {"count": len(ids), "max_model_len": services.frozen.context_length, "tokens": ids}
    return {**shown, "token_strs": texts}


@router.post("/detokenize")
async def detokenize(request: Request, services: Serving, caller: Calling) -> dict[str, str]:
    """The text of ids, special tokens included, so that what was tokenized comes back."""
    body = await schemas.read(request, DetokenizeBody)
    await _check_model(body.model, services, caller)
    prompts.check_ids(body.tokens, services, "tokens")
    return {"prompt": await to_thread.run_sync(_decode, body.tokens, services, limiter=services.tokenizing)}


@router.get("/tokenizer_info")
async def info(services: Serving) -> dict[str, Any]:
    """What a client needs to know about the tokenizer without having it."""
    tokenizer = services.frozen.tokenizer
    own = tokenizer.chat_template
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "vocab_size": services.frozen.vocabulary_size,
        "model_max_length": services.frozen.context_length,
        **{f"{name}_token": getattr(tokenizer, f"{name}_token", None) for name in ("bos", "eos", "pad", "unk")},
        "chat_template": services.chat_template or (own.get("default") if isinstance(own, dict) else own),
    }


async def _check_model(model: str | None, services: Services, caller: Caller) -> None:
    """There is one tokenizer, so no name is needed, but a wrong one is an error here too."""
    if model is not None:
        await to_thread.run_sync(model_names.resolve, model, services, caller)


def _encode(body: TokenizeBody, services: Services) -> tuple[list[int], list[str] | None]:
    """By default a text gets the tokenizer's special tokens, and messages have those of their template."""
    tokenizer = services.frozen.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("either prompt or messages must be given", param="prompt")
    text, special = body.prompt, True
    if body.messages is not None:
        messages = [message.to_json() for message in body.messages]
        text, special = render_chat(tokenizer, messages, services.chat_template), False
    if len(text or "") > LONGEST_TEXT:
        raise InvalidRequest(f"prompt must be at most {LONGEST_TEXT} characters", param="prompt")
    special = special if body.add_special_tokens is None else body.add_special_tokens
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False).input_ids
    return ids, tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None


def _decode(ids: list[int], services: Services) -> str:
    text: str = services.frozen.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
