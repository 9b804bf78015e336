"""The teacher of a distillation: the frozen model itself, with a long text in its context.

The student is the same model with the prefix in the text's place. The teacher is asked once, before training, and what
it said stays with the examples: 20 tokens for each that counts, as in Cartridges (Eyuboglu et al. 2025), 120 bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from prefix_store.errors import ContextLengthExceeded, InvalidRequest
from prefix_store.model import apply, prompt
from prefix_store.model.apply import PrefixRows
from prefix_store.model.example import TopTokens
from prefix_store.model.frozen import FrozenModel
from prefix_store.prefix import Window
from trainer.data import Example, batches
from trainer.slices import Sliced

TOP = 20


def teaching(frozen: FrozenModel, context: str, examples: Sequence[Example], batch_size: int) -> Sliced[list[Example]]:
    """The examples, each with what the model holds likely at every token that counts, having read `context`.

    A batch at a time. An example stands behind the context without its BOS, for one text has one beginning. Raises
    InvalidRequest for a context of less than two tokens, ContextLengthExceeded where it leaves no room for the longest
    example.
    """
    read = prompt.encode(frozen.tokenizer, context)
    if len(read) < 2:
        raise InvalidRequest("the context must be a text of at least two tokens", param="context")
    longest = max((len(example.ids) for example in examples), default=0)
    if len(read) + longest > frozen.context_length:
        raise ContextLengthExceeded(
            f"the context has {len(read)} tokens and the longest example {longest}, "
            f"more than the {frozen.context_length} that the model can read at once",
            param="context",
        )
    kv = apply.prefill_kv(frozen, read[:-1])
    found: list[Example] = []
    for batch in batches(examples, batch_size):
        found += _ask(frozen, kv, read[-1], batch)
        yield
    return found


@torch.no_grad()
def _ask(frozen: FrozenModel, kv: torch.Tensor, last: int, examples: Sequence[Example]) -> list[Example]:
    """`kv` is of all the context but its `last` token, which stands where an example has its BOS."""
    bos = frozen.tokenizer.bos_token_id
    rows = [torch.tensor([last, *example.ids[example.ids[0] == bos :]]) for example in examples]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    real = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    prefixes = PrefixRows.shared(kv, len(rows), kv.shape[3], Window.SLIDES)
    logits = apply.logits(frozen, ids.to(frozen.device), real.to(frozen.device), prefixes)
    return [
        dataclasses.replace(example, teacher=_top(row[_before(example, len(real_ids))]))
        for example, row, real_ids in zip(examples, logits, rows, strict=True)
    ]


def _before(example: Example, length: int) -> list[int]:
    """Where in the teacher's row of `length` tokens the logits are that predict the example's targets."""
    shift = length - len(example.ids)
    return [place + shift - 1 for place in example.targets]


def _top(logits: torch.Tensor) -> TopTokens:
    best = logits.float().log_softmax(1).topk(min(TOP, logits.shape[1]))
    return TopTokens(best.indices.int().cpu(), best.values.exp().half().cpu())
