"""The text that a prefix starts from: random rows wreck a trained model, and equal rows never separate."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, cycle, islice
from typing import Any

from prefix_store.errors import InvalidRequest
from prefix_store.jobs import TrainingSpec


def initial_ids(tokenizer: Any, spec: TrainingSpec, text: Iterable[int]) -> list[int]:
    """P token ids to start from: BOS where there is one, then `spec.init_text` or else `text`, repeated if short.

    Raises InvalidRequest where neither has a token.
    """
    if spec.init_text is not None:
        text = tokenizer(spec.init_text, add_special_tokens=False, verbose=False).input_ids
    bos = tokenizer.bos_token_id
    words = [token for token in islice(text, 2 * spec.virtual_tokens) if token not in (bos, tokenizer.eos_token_id)]
    if not words:
        raise InvalidRequest("the text to start the prefix from has no tokens", param="init_text")
    return list(islice(chain([bos] if bos is not None else [], cycle(words)), spec.virtual_tokens))
