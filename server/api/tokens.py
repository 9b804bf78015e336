"""/tokenize, /detokenize and /tokenizer_info, for clients that count, cut or score tokens themselves."""

from __future__ import annotations

import json
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request

from prefix_store.errors import ContextLengthExceeded, InvalidRequest, InvalidTrainingData
from prefix_store.examples import canonical
from prefix_store.model.example import Example, ExampleEncoder
from prefix_store.model.prompt import render_chat
from server.api import generation, model_names, prompts, schemas
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
    if sum(given is not None for given in (body.prompt, body.messages, body.example)) != 1:
        raise InvalidRequest("one of prompt, messages and example must be given", param="prompt")
    if body.example is not None:
        return await _tokenize_example(body.example, body, services, caller)
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


async def _tokenize_example(
    example: dict[str, Any], body: TokenizeBody, services: Services, caller: Caller
) -> dict[str, Any]:
    """An example as training would read it, in the prefix's template, and the places of the tokens that it counts."""
    prefix = await model_names.load(body.model, services, caller) if body.model is not None else None
    room = services.frozen.context_length - generation.virtual_tokens(prefix)
    template = prefix.template if prefix is not None else None
    frozen = services.frozen
    start = frozen.start_ids if frozen.is_encoder_decoder else ()
    encoder = ExampleEncoder(frozen.tokenizer, frozen.end_ids, template, services.chat_template, start)
    kept = min(body.max_length or room, room)
    pieces = await to_thread.run_sync(_encode_example, encoder, example, kept, limiter=services.tokenizing)
    return {"max_model_len": frozen.context_length, "examples": [_shown(piece) for piece in pieces]}


async def _check_model(model: str | None, services: Services, caller: Caller) -> None:
    """There is one tokenizer, so no name is needed, but a wrong one is an error here too."""
    if model is not None:
        await to_thread.run_sync(model_names.resolve, model, services, caller)


def _encode(body: TokenizeBody, services: Services) -> tuple[list[int], list[str] | None]:
    """By default a text gets the tokenizer's special tokens, and messages have those of their template."""
    tokenizer = services.frozen.tokenizer
    text, special = body.prompt, True
    if body.messages is not None:
        messages = [message.to_json() for message in body.messages]
        text, special = render_chat(tokenizer, messages, services.chat_template), False
    if len(text or "") > LONGEST_TEXT:
        raise InvalidRequest(f"prompt must be at most {LONGEST_TEXT} characters", param="prompt")
    special = special if body.add_special_tokens is None else body.add_special_tokens
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False).input_ids
    return ids, tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None


def _shown(example: Example) -> dict[str, Any]:
    read = {"source": example.source} if example.source else {}
    return {"tokens": example.ids, "targets": list(example.targets), **read}


def _encode_example(encoder: ExampleEncoder, example: dict[str, Any], room: int) -> list[Example]:
    if room < 2:
        raise ContextLengthExceeded("the prefix leaves no room for an example", param="example")
    try:
        kept = canonical(example)
        if len(json.dumps(kept)) > LONGEST_TEXT:
            raise InvalidTrainingData(f"an example must be at most {LONGEST_TEXT} bytes")
        return encoder.encode(kept, room)
    except InvalidTrainingData as error:
        raise InvalidTrainingData(error.message, param="example") from None


def _decode(ids: list[int], services: Services) -> str:
    text: str = services.frozen.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
