from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import pytest

from prefix_store.errors import InvalidTrainingData
from tests.models import BOS, EOS, tiny_tokenizer
from trainer import data
from trainer.data import IGNORED, Example

TOKENIZER = tiny_tokenizer()


def tokens(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False).input_ids


def tokenize_one(prompt: str, completion: str, max_length: int = 100) -> Example:
    (example,) = data.tokenize(TOKENIZER, [{"prompt": prompt, "completion": completion}], max_length)
    return example


def test_an_example_is_the_prompt_as_served_then_the_completion():
    assert tokenize_one("ab", "cd") == Example((BOS, *tokens("abcd"), EOS), 3)


def test_a_template_stands_around_the_prompt_and_nothing_else():
    example = {"prompt": "ab", "completion": "cd"}
    (framed,) = data.tokenize(TOKENIZER, [example], 100, "Q: {prompt}\nA:")
    assert framed == tokenize_one("Q: ab\nA:", "cd")


@pytest.mark.parametrize(
    ("max_length", "ids", "prompt_length"),
    [
        (8, (BOS, *tokens("abcdxy"), EOS), 5),
        (7, (BOS, *tokens("bcdxy"), EOS), 4),
        (5, (BOS, *tokens("dxy"), EOS), 2),
        (4, (BOS, *tokens("xy"), EOS), 1),
        (3, (BOS, *tokens("xy")), 1),
        (2, (BOS, *tokens("x")), 1),
    ],
)
def test_too_long_an_example_loses_its_prompts_beginning_and_then_its_end(max_length, ids, prompt_length):
    assert tokenize_one("abcd", "xy", max_length) == Example(ids, prompt_length)


def test_without_a_bos_the_prompts_last_token_stays():
    tokenizer = tiny_tokenizer(bos=False)
    (example,) = data.tokenize(tokenizer, [{"prompt": "abcd", "completion": "xyz"}], 3)
    assert example == Example(tuple(tokens("dxy")), 1)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"prompt": "a"}, "'completion' must be a text"),
        ({"prompt": 3, "completion": "b"}, "'prompt' must be a text"),
        ({"prompt": "a", "completion": ""}, "the completion is empty"),
    ],
)
def test_a_bad_example_is_named_by_its_line(bad, reason):
    with pytest.raises(InvalidTrainingData, match=f"line 2: {reason}"):
        data.tokenize(TOKENIZER, [{"prompt": "a", "completion": "b"}, bad], 10)


def test_an_empty_prompt_that_nothing_stands_for_is_named_by_its_line():
    tokenizer = tiny_tokenizer(bos=False)
    tokenizer.bos_token = None
    with pytest.raises(InvalidTrainingData, match=r"line 1: .*no BOS"):
        data.tokenize(tokenizer, [{"prompt": "", "completion": "b"}], 10)


def test_labels_stand_on_the_completion_alone():
    batch = data.collate([Example((5, 6, 7, 8), 2), Example((5, 9), 1)])
    assert batch.ids.tolist() == [[5, 6, 7, 8], [5, 9, 0, 0]]
    assert batch.real_mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.labels.tolist() == [[IGNORED, IGNORED, 7, 8], [IGNORED, 9, IGNORED, IGNORED]]


def numbered(count: int) -> list[Example]:
    return [Example((index, 100), 1) for index in range(count)]


@pytest.mark.parametrize(("count", "valid"), [(1, 0), (9, 0), (10, 1), (25, 2), (400, 40), (5000, 64)])
def test_a_tenth_is_set_aside(count, valid):
    parts = data.split(numbered(count), seed=3)
    assert len(parts.valid) == valid
    assert sorted(parts.train + parts.valid, key=lambda example: example.ids) == numbered(count)
    assert parts == data.split(numbered(count), seed=3)


def test_another_seed_sets_others_aside():
    assert data.split(numbered(100), seed=0).valid != data.split(numbered(100), seed=1).valid


def firsts(batch: Sequence[Example]) -> list[int]:
    return [example.ids[0] for example in batch]


def drawn(count: int, size: int, seed: int, batches: int) -> list[list[int]]:
    stream = islice(data.shuffled_batches(numbered(count), size, seed), batches)
    return [firsts(batch) for batch in stream]


def test_every_epoch_shows_every_example_once():
    order = [index for batch in drawn(10, 4, 0, 5) for index in batch]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:] != list(range(10))


def test_batches_are_full_unless_there_are_too_few_examples():
    assert {len(batch) for batch in drawn(10, 4, 0, 8)} == {4}
    assert {len(set(batch)) for batch in drawn(3, 8, 0, 5)} == {3}


def test_the_seed_decides_the_order():
    assert drawn(10, 4, 0, 5) == drawn(10, 4, 0, 5) != drawn(10, 4, 1, 5)


def test_plain_batches_show_every_example_once_in_order():
    assert [firsts(batch) for batch in data.batches(numbered(5), 2)] == [[0, 1], [2, 3], [4]]
