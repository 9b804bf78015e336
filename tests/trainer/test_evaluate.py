from __future__ import annotations

import pytest
import torch

from prefix_store.model import apply
from prefix_store.model.apply import PrefixRows
from prefix_store.prefix import Window
from tests.models import random_kv, tiny_frozen
from trainer import data
from trainer.data import IGNORED, Example
from trainer.evaluate import nats_per_token

FROZEN = apply.attach(tiny_frozen("llama"))
EXAMPLES = [Example((0, 5, 6, 7, 8, 1), 2), Example((0, 9, 4), 2), Example((0, 3, 3, 9), 1)]


def test_the_bare_model_scores_as_transformers_says():
    plain = tiny_frozen("llama").model
    ids, start = torch.tensor([EXAMPLES[0].ids]), EXAMPLES[0].prompt_length
    labels = ids.clone()
    labels[:, :start] = IGNORED
    expected = plain(ids, labels=labels).loss.item()
    assert nats_per_token(FROZEN, None, data.batches(EXAMPLES[:1], 1)) == pytest.approx(expected, abs=1e-6)


def test_every_token_counts_the_same_however_it_is_batched():
    kv = random_kv(FROZEN, 4)

    def rows(count: int) -> PrefixRows:
        return PrefixRows.shared(kv, count, 4, Window.ALWAYS)

    each = [nats_per_token(FROZEN, rows, data.batches([example], 1)) for example in EXAMPLES]
    tokens = [len(example.ids) - example.prompt_length for example in EXAMPLES]
    expected = sum(nats * count for nats, count in zip(each, tokens, strict=True)) / sum(tokens)
    for size in (1, 2, 3):
        assert nats_per_token(FROZEN, rows, data.batches(EXAMPLES, size)) == pytest.approx(expected, abs=1e-5)
    assert nats_per_token(FROZEN, None, data.batches(EXAMPLES, 3)) != pytest.approx(expected, abs=0.05)
