from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import pytest

from prefix_store.errors import InvalidTrainingData
from prefix_store.jobs import CHOSEN_BY_DATA, TrainingSpec
from prefix_store.model.example import ExampleEncoder
from tests.models import BOS, EOS, tiny_frozen, tiny_tokenizer
from trainer import data
from trainer.data import IGNORED, Example

FROZEN = tiny_frozen("llama")
CHAT = "{% for message in messages %}{{ message.content }}|{% endfor %}"


def tokens(text: str) -> list[int]:
    return FROZEN.tokenizer(text, add_special_tokens=False).input_ids


def tokenize_one(prompt: str, completion: str, max_length: int = 100) -> Example:
    (example,) = data.tokenize(FROZEN.tokenizer, [{"prompt": prompt, "completion": completion}], max_length)
    return example


def test_an_example_is_the_prompt_as_served_then_the_completion():
    assert tokenize_one("ab", "cd") == Example((BOS, *tokens("abcd"), EOS), 3)


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


def test_a_template_stands_around_the_prompt_and_nothing_else():
    example = {"prompt": "ab", "completion": "cd"}
    (framed,) = data.tokenize(FROZEN.tokenizer, [example], 100, "Q: {prompt}\nA:")
    assert framed == tokenize_one("Q: ab\nA:", "cd")


def test_without_a_bos_the_prompts_last_token_stays():
    tokenizer = tiny_tokenizer(bos=False)
    (example,) = data.tokenize(tokenizer, [{"prompt": "abcd", "completion": "xyz"}], 3)
    assert example == Example(tuple(tokens("dxy")), 1)


def test_what_cannot_be_encoded_is_named_by_its_line():
    tokenizer = tiny_tokenizer(bos=False)
    tokenizer.bos_token = None
    encoder = ExampleEncoder(tokenizer, frozenset({EOS}))
    examples = [{"prompt": "a", "completion": "b"}, {"prompt": "", "completion": "b"}]
    with pytest.raises(InvalidTrainingData, match=r"^line 2: .*no BOS"):
        data.encode_lines(encoder, examples, 10)
    with pytest.raises(InvalidTrainingData, match=r"^validation_examples, line 2: .*no BOS"):
        data.encode_lines(encoder, examples, 10, "validation_examples")


def submitted(examples, validation=(), **options) -> TrainingSpec:
    unset = tuple(name for name in CHOSEN_BY_DATA if name not in options)
    return TrainingSpec("0" * 64, len(examples), validation_examples=len(validation), unset=unset, **options)


def pairs(count: int, length: int = 1) -> list[dict[str, str]]:
    return [{"prompt": f"{number}", "completion": "x" * length} for number in range(count)]


def test_a_job_that_chooses_nothing_gets_all_it_needs():
    examples = pairs(30, 20)
    ready = data.prepare(FROZEN, submitted(examples), examples)
    assert (len(ready.train), len(ready.valid)) == (27, 3)
    assert ready.spec.unset == ()
    assert ready.chosen == CHOSEN_BY_DATA
    assert ready.spec.max_length == max(len(example.ids) for example in ready.train)
    assert ready.summary.startswith("training on 27 examples of up to 24 tokens, validating on 3; chosen for them: ")
    for name in CHOSEN_BY_DATA:
        assert f"{name} {getattr(ready.spec, name)}" in ready.summary


def test_what_was_chosen_stays():
    given = {"virtual_tokens": 3, "steps": 7, "batch_size": 2, "max_length": 12}
    examples = pairs(4, 20)
    ready = data.prepare(FROZEN, submitted(examples, **given), examples)
    assert {name: getattr(ready.spec, name) for name in given} == given
    assert {len(example.ids) for example in ready.train} == {12}
    assert ready.summary == "training on 4 examples of up to 12 tokens, validating on 0"


def test_examples_to_judge_by_may_come_of_their_own_and_then_none_is_set_aside():
    examples, validation = pairs(30), [{"text": "judge"}]
    ready = data.prepare(FROZEN, submitted(examples, validation), examples, validation)
    assert len(ready.train) == 30
    assert [example.ids for example in ready.valid] == [(BOS, *tokens("judge"), EOS)]


def test_shapes_may_be_mixed_and_the_chat_template_is_the_jobs():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    examples = [{"text": "t"}, {"prompt": "p", "completion": "c"}, {"messages": messages}]
    ready = data.prepare(FROZEN, submitted(examples, chat_template=CHAT), examples)
    assert [example.ids for example in ready.train] == [
        (BOS, *tokens("t"), EOS), (BOS, *tokens("pc"), EOS), (*tokens("a|b|"), EOS)
    ]  # fmt: skip


def test_what_becomes_of_one_line_stays_on_one_side():
    """Pieces of a text that is learned would make the judgement of its other pieces too good."""
    examples = [{"text": chr(97 + number) * 40} for number in range(20)]
    ready = data.prepare(FROZEN, submitted(examples, max_length=10), examples)
    learned, judged = ({example.ids[1:3] for example in part} for part in (ready.train, ready.valid))
    assert len(judged) == 2
    assert not learned & judged


def test_labels_stand_on_every_answer_of_a_conversation():
    batch = data.collate([Example((5, 6, 7, 8, 9), 1, (range(1, 2), range(3, 5))), Example((5, 6), 1)])
    assert batch.labels.tolist() == [[IGNORED, 6, IGNORED, 8, 9], [IGNORED, 6, IGNORED, IGNORED, IGNORED]]


def test_labels_stand_on_the_completion_alone():
    batch = data.collate([Example((5, 6, 7, 8), 2), Example((5, 9), 1)])
    assert batch.ids.tolist() == [[5, 6, 7, 8], [5, 9, 0, 0]]
    assert batch.real_mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.labels.tolist() == [[IGNORED, IGNORED, 7, 8], [IGNORED, 9, IGNORED, IGNORED]]


def numbered(count: int) -> list[Example]:
    return [Example((index, 100), 1) for index in range(count)]


@pytest.mark.parametrize(("count", "valid"), [(1, 0), (9, 0), (10, 1), (25, 2), (400, 40), (5000, 64)])
def test_a_tenth_is_set_aside(count, valid):
    train, judged = data.split(numbered(count), seed=3)
    assert len(judged) == valid
    assert sorted(train + judged, key=lambda example: example.ids) == numbered(count)
    assert (train, judged) == data.split(numbered(count), seed=3)


def test_another_seed_sets_others_aside():
    assert data.split(numbered(100), seed=0)[1] != data.split(numbered(100), seed=1)[1]


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
