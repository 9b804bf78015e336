"""GET /v1/prefixes/{ref}/inspect: nearest words, norms, attention to it, what each virtual token is good for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Depends, Query

from prefix_store.errors import ContextLengthExceeded
from prefix_store.model.inspect import Inspection, inspect
from prefix_store.prefix import Method, PrefixManifest, PrefixVersion
from prefix_store.tensors import PrefixTensors
from server.api import aside, prompts, queries, references
from server.api.auth import Caller, Calling
from server.api.prompts import Prompt
from server.api.services import Services, Serving
from server.engine import reference
from server.text import UNFINISHED

# Attention's weights are made whole here, [Hq, T, P + T] for each layer: at most so many tokens and numbers.
MOST_TOKENS, MOST_WEIGHTS = 1024, 1 << 27
NO_TEXT, TOO_SHORT = "give a prompt to measure it on", "the prompts predict nothing: give one of two tokens or more"
NO_SOFTMAX = "a memory of prefix_plus stands beside the softmax: it has no virtual tokens and no part of the attention"
router = APIRouter(prefix="/v1/prefixes")
Texts = Annotated[list[str], Query(max_length=64)]


@router.get("/{ref:path}/inspect", dependencies=[Depends(queries.only_known)])
async def look(ref: str, services: Serving, caller: Calling, prompt: Texts = []) -> dict[str, Any]:  # noqa: B006
    """Looks into a prefix in a thread of its own, one at a time, while the engine goes on."""
    version, manifest, tensors = await to_thread.run_sync(_read, services, ref, caller)
    texts = [await prompts.from_text(text, manifest.template, services) for text in prompt]
    _check_room(services, manifest, texts)
    ids = [text.ids for text in texts]
    return await aside.run(services, partial(_inspect, services, version, manifest, tensors, ids))


def _read(services: Services, ref: str, caller: Caller) -> tuple[PrefixVersion, PrefixManifest, PrefixTensors]:
    references.decoder_only(services, "be inspected")
    version = references.resolve(services, ref, caller)
    manifest, tensors = services.store.prefixes.read(version)
    frozen = services.frozen
    frozen.check_fits(manifest)
    return version, manifest, tensors


def _check_room(services: Services, manifest: PrefixManifest, texts: Sequence[Prompt]) -> None:
    """Raises ContextLengthExceeded for more text than is read here."""
    frozen, length = services.frozen, manifest.virtual_tokens
    room = min(MOST_TOKENS, MOST_WEIGHTS // (frozen.geometry.query_heads * (length + MOST_TOKENS)))
    given = sum(len(text.ids) for text in texts)
    longest = max((len(text.ids) for text in texts), default=0)
    if given > room or longest + length > frozen.context_length:
        raise ContextLengthExceeded(
            f"an inspection of this prefix reads at most {min(room, frozen.context_length - length)} tokens; "
            f"the prompts have {given}",
            param="prompt",
        )


def _inspect(
    services: Services,
    version: PrefixVersion,
    manifest: PrefixManifest,
    tensors: PrefixTensors,
    texts: Sequence[Sequence[int]],
) -> dict[str, Any]:
    found = inspect(reference.attached(services.frozen), manifest, tensors, texts)
    has_tokens = manifest.method is not Method.PREFIX_PLUS
    return {
        "id": version.name,
        "object": "prefix.inspection",
        "version": version.version,
        "digest": version.digest,
        "method": version.method,
        "virtual_tokens": version.virtual_tokens,
        "prompt_tokens": sum(map(len, texts)),
        "tokens": _tokens(found, services.frozen.tokenizer) if has_tokens else [],
        "layers": _layers(found),
        "attention": _attention(found),
        "absent": _absent(found, has_tokens=has_tokens, has_text=bool(texts)),
        "computed_with": reference.weights(services.frozen),
    }


def _tokens(found: Inspection, tokenizer: Any) -> list[dict[str, Any]]:
    """One for each virtual token; rank 1 is the most important."""
    assert found.words is not None
    assert found.norms.keys is not None
    embeds, shares, importance = found.norms.embeds, found.shares, found.importance
    ranks = importance.rises.argsort(descending=True).argsort() + 1 if importance else None
    return [
        {
            "index": index,
            "nearest": [
                {"token": _word(token, tokenizer), "token_id": token, "score": score}
                for token, score in zip(ids, scores, strict=True)
            ],
            "embedding_norm": float(embeds[index]) if embeds is not None else None,
            "share": float(shares.by_token[index]) if shares else None,
            "importance": float(importance.rises[index]) if importance else None,
            "rank": int(ranks[index]) if ranks is not None else None,
        }
        for index, (ids, scores) in enumerate(zip(found.words.ids.tolist(), found.words.scores.tolist(), strict=True))
    ]


def _word(token_id: int, tokenizer: Any) -> str:
    """The token's own text, a special token's name; its id where that is only a part of a character."""
    text: str = tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text if text and UNFINISHED not in text else f"token_id:{token_id}"


def _layers(found: Inspection) -> list[dict[str, Any]]:
    norms = found.norms
    if norms.memory is not None:
        return [{"layer": layer, "memory_norms": row} for layer, row in enumerate(norms.memory.tolist())]
    assert norms.keys is not None
    assert norms.values is not None
    return [
        {"layer": layer, "key_norms": keys, "value_norms": values}
        for layer, (keys, values) in enumerate(zip(norms.keys.tolist(), norms.values.tolist(), strict=True))
    ]


def _attention(found: Inspection) -> dict[str, Any] | None:
    if found.shares is None:
        return None
    mean, last = found.shares.mean, found.shares.last
    return {
        "share": float(mean.mean()),
        "last_token_share": float(last.mean()),
        "layers": [
            {"layer": layer, "heads": heads, "last_token_heads": ends}
            for layer, (heads, ends) in enumerate(zip(mean.tolist(), last.tolist(), strict=True))
        ],
    }


def _absent(found: Inspection, *, has_tokens: bool, has_text: bool) -> dict[str, str]:
    """Why what is null is null."""
    if not has_tokens:
        return {"tokens": NO_SOFTMAX, "attention": NO_SOFTMAX}
    if not has_text:
        return {"attention": NO_TEXT, "importance": NO_TEXT}
    return {} if found.importance is not None else {"importance": TOO_SHORT}
