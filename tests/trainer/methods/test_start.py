from __future__ import annotations

from itertools import count

import pytest
import torch

from prefix_store.errors import InvalidRequest
from prefix_store.jobs import TrainingSpec
from prefix_store.model import apply
from tests.models import BOS, EOS, random_kv, random_memory, tiny_frozen, tiny_tokenizer
from trainer.methods import METHODS
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


def test_random_tokens_are_words_of_the_vocabulary_and_the_seed_s():
    tokenizer = tiny_tokenizer()
    first, again, other = (
        initial_ids(tokenizer, spec(init="random_tokens", seed=seed, virtual_tokens=40), [5, 6]) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert first[0] == BOS
    assert not {BOS, EOS} & set(first[1:])
    assert len(set(first[1:])) > 20
    assert set(first[1:]) <= set(range(len(tokenizer)))


def test_a_finished_prefix_is_no_text_to_start_from():
    with pytest.raises(InvalidRequest, match="method 'low_rank' starts from text, not from another prefix") as caught:
        initial_ids(tiny_tokenizer(), spec(method="low_rank"), {"self.kv": torch.zeros(1)})
    assert caught.value.param == "init_from"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_starts_as_the_prefix_that_it_is_given_or_refuses_it(name):
    frozen = apply.attach(tiny_frozen("llama"))
    given = {
        "self.kv": random_kv(frozen, 4).half(),
        "embeds": torch.randn(4, frozen.geometry.hidden_size, generator=torch.Generator().manual_seed(0)),
        "memory": random_memory(frozen),
    }
    asked = spec(method=name, virtual_tokens=0 if name == "prefix_plus" else 4, init_from="acme/x@1")
    (payload,) = METHODS[name](frozen, spec(), count(40)).tensors() if name != "prefix_plus" else ["memory"]
    for kind, tensor in given.items():
        if kind == payload:
            made = METHODS[name](frozen, asked, {kind: tensor}).tensors()[kind]
            torch.testing.assert_close(made, tensor.float(), atol=1e-4, rtol=1e-4)
        else:
            with pytest.raises(InvalidRequest, match=f"from a prefix of '{payload}', and this one is of '{kind}'"):
                METHODS[name](frozen, asked, {kind: tensor})
