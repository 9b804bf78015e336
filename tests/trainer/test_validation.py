from __future__ import annotations

import pytest
import torch

from prefix_store.model import apply
from prefix_store.model.apply import PrefixRows
from prefix_store.prefix import Window
from tests.judging import nats_per_token
from tests.models import random_kv, tiny_frozen
from tests.trainer.runs import EXAMPLES, FROZEN, make
from trainer import data
from trainer.data import IGNORED, Example
from trainer.step import score
from trainer.validation import Validation


@pytest.mark.parametrize("size", [1, 5, 12, 50])
def test_slices_of_any_size_add_up_to_the_whole(size):
    method = make().method
    for rows in (None, method.rows):
        validation, slices = Validation(EXAMPLES, size, rows), 0
        while not validation.done:
            validation.add(*score(FROZEN, [validation]))
            slices += 1
        assert slices == -(-len(EXAMPLES) // size)
        assert validation.is_bare == (rows is None)
        assert validation.loss == pytest.approx(nats_per_token(FROZEN, rows, data.batches(EXAMPLES, 4)), abs=1e-5)


PLAIN = apply.attach(tiny_frozen("llama"))
FEW = [Example((0, 5, 6, 7, 8, 1), 2), Example((0, 9, 4), 2), Example((0, 3, 3, 9), 1)]


def test_the_bare_model_scores_as_transformers_says():
    plain = tiny_frozen("llama").model
    ids, start = torch.tensor([FEW[0].ids]), FEW[0].prompt_length
    labels = ids.clone()
    labels[:, :start] = IGNORED
    expected = plain(ids, labels=labels).loss.item()
    assert nats_per_token(PLAIN, None, data.batches(FEW[:1], 1)) == pytest.approx(expected, abs=1e-6)


def test_every_token_counts_the_same_however_it_is_batched():
    kv = random_kv(PLAIN, 4)

    def rows(count: int) -> PrefixRows:
        return PrefixRows.shared(kv, count, 4, Window.ALWAYS)

    each = [nats_per_token(PLAIN, rows, data.batches([example], 1)) for example in FEW]
    tokens = [len(example.ids) - example.prompt_length for example in FEW]
    expected = sum(nats * count for nats, count in zip(each, tokens, strict=True)) / sum(tokens)
    for size in (1, 2, 3):
        assert nats_per_token(PLAIN, rows, data.batches(FEW, size)) == pytest.approx(expected, abs=1e-5)
    assert nats_per_token(PLAIN, None, data.batches(FEW, 3)) != pytest.approx(expected, abs=0.05)
