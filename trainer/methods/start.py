"""What a prefix starts from: random rows wreck a trained model, and equal rows never separate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, cycle, islice
from typing import Any

import torch

from prefix_store.errors import InvalidRequest
from prefix_store.geometry import Stack
from prefix_store.jobs import TrainingSpec
from prefix_store.model import apply, both
from prefix_store.model.frozen import FrozenModel
from prefix_store.tensors import STACKS, PrefixTensors

# Token ids of a text, or the tensors of a finished prefix, where the job names one as `init_from`.
Start = Iterable[int] | PrefixTensors


def initial_ids(tokenizer: Any, spec: TrainingSpec, start: Start) -> list[int]:
    """P token ids to start from: BOS where there is one, then `start`, repeated if short.

    `spec.init_text` or random tokens go before `start` where the job asks for them. Raises InvalidRequest where there
    is no token, and where the job starts from another prefix, which is no text.
    """
    if isinstance(start, dict):
        raise InvalidRequest(f"method {spec.method!r} starts from text, not from another prefix", param="init_from")
    text: Iterable[int] = start
    if spec.init == "random_tokens":
        text = random_tokens(tokenizer, spec.seed)
    elif spec.init_text is not None:
        text = tokenizer(spec.init_text, add_special_tokens=False, verbose=False).input_ids
    bos = tokenizer.bos_token_id
    words = [token for token in islice(text, 2 * spec.virtual_tokens) if token not in (bos, tokenizer.eos_token_id)]
    if not words:
        raise InvalidRequest("the text to start the prefix from has no tokens", param="init_text")
    return list(islice(chain([bos] if bos is not None else [], cycle(words)), spec.virtual_tokens))


def initial_kv(frozen: FrozenModel, spec: TrainingSpec, start: Start) -> torch.Tensor:
    """Keys and values `[L, 2, Hkv, P, D]` to start from, in float32: a finished prefix's, or those of `initial_ids`."""
    if isinstance(start, dict):
        return tensor_of(frozen, spec, start, "self.kv")
    if frozen.is_encoder_decoder:
        return both.prefill(frozen, initial_ids(frozen.tokenizer, spec, start))[Stack.SELF]
    return apply.prefill_kv(frozen, initial_ids(frozen.tokenizer, spec, start))


def initial_kvs(frozen: FrozenModel, spec: TrainingSpec, start: Start) -> dict[Stack, torch.Tensor]:
    """The same for each stack of an encoder-decoder model that the job asks for.

    Those of a text are what the encoder makes of it, and the decoder, having read that, of writing it.
    """
    asked = asked_stacks(spec, start)
    if isinstance(start, dict):
        return {stack: tensor_of(frozen, spec, start, STACKS[stack]) for stack in asked}
    found = both.prefill(frozen, initial_ids(frozen.tokenizer, spec, start))
    return {stack: found[stack] for stack in asked}


def asked_stacks(spec: TrainingSpec, start: Start) -> Sequence[Stack]:
    """Those of an encoder-decoder model that the job asks for: where it names none, its start's, else all."""
    if spec.stacks or not isinstance(start, dict):
        return spec.stacks or tuple(Stack)
    return [stack for stack in Stack if STACKS[stack] in start] or [Stack.SELF]


def initial_embeds(frozen: FrozenModel, spec: TrainingSpec, start: Start) -> torch.Tensor:
    """Input embeddings `[P, E]` to start from, in float32: a finished soft prompt's, or those of `initial_ids`."""
    if isinstance(start, dict):
        return tensor_of(frozen, spec, start, "embeds")
    ids = torch.tensor(initial_ids(frozen.tokenizer, spec, start), device=frozen.device)
    embed = frozen.source_embeds if frozen.is_encoder_decoder else frozen.model.get_input_embeddings()
    embeddings: torch.Tensor = embed(ids)
    return embeddings.detach().float()


def tensor_of(frozen: FrozenModel, spec: TrainingSpec, stored: PrefixTensors, name: str) -> torch.Tensor:
    """A finished prefix's tensor in float32. Raises InvalidRequest where it is of another kind."""
    if name not in stored:
        raise InvalidRequest(
            f"method {spec.method!r} starts from a prefix of {name!r}, and this one is of {', '.join(stored)!r}",
            param="init_from",
        )
    return stored[name].to(frozen.device, torch.float32)


def random_tokens(tokenizer: Any, seed: int) -> Iterator[int]:
    """Words of the vocabulary without end, none of them special, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    special = set(tokenizer.all_special_ids)
    while True:
        token = int(torch.randint(len(tokenizer), (), generator=generator))
        if token not in special:
            yield token
