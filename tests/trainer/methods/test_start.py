from __future__ import annotations

import pytest

from prefix_store.errors import InvalidRequest
from prefix_store.jobs import TrainingSpec
from tests.models import BOS, EOS, tiny_tokenizer
from trainer.methods.start import initial_ids


def spec(**options) -> TrainingSpec:
    return TrainingSpec("0" * 64, 1, **{"virtual_tokens": 4, **options})


@pytest.mark.parametrize(
    ("options", "text", "ids"),
    [
        ({}, [BOS, 5, 6, EOS, BOS, 7, 8], [BOS, 5, 6, 7]),
        ({}, [5, 6], [BOS, 5, 6, 5]),
        ({"init_text": "abc"}, [5, 6], [BOS, *tiny_tokenizer(bos=False)("abc").input_ids]),
        ({"virtual_tokens": 1}, [5], [BOS]),
    ],
)
def test_the_text_to_start_from(options, text, ids):
    assert initial_ids(tiny_tokenizer(), spec(**options), text) == ids


def test_without_a_bos_the_text_comes_first():
    tokenizer = tiny_tokenizer(bos=False)
    tokenizer.bos_token = None
    assert initial_ids(tokenizer, spec(), [5, 6]) == [5, 6, 5, 6]


def test_an_empty_text_to_start_from_is_refused():
    with pytest.raises(InvalidRequest, match="no tokens"):
        initial_ids(tiny_tokenizer(), spec(init_text=""), [5])
