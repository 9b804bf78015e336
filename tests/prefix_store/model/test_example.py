from __future__ import annotations

import itertools

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from prefix_store.errors import ChatTemplateMissing, InvalidTrainingData
from prefix_store.model import prompt
from prefix_store.model.example import Example, ExampleEncoder
from prefix_store.model.frozen import BUNDLED
from tests.models import BOS, EOS, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
BUNDLED_TOKENIZER = AutoTokenizer.from_pretrained(BUNDLED)
EACH = "{% for message in messages %}"
# without an end of its own; with one, and something behind it; with thoughts in the last answer alone, as Qwen 3's
ROLES = (
    EACH
    + "{{ message.role | capitalize }}: {{ message.content | trim }}\n{% endfor %}"
    + ("{% if add_generation_prompt %}Assistant:{% endif %}")
)
MARKS = (
    "<s>"
    + EACH
    + "<{{ message.role }}>\n{{ message.content }}</s>\n{% endfor %}"
    + ("{% if add_generation_prompt %}<assistant>\n{% endif %}")
)
THOUGHTS = EACH + (
    "<{{ message.role }}>{% if loop.last and message.role == 'assistant' %}<think></think>{% endif %}"
    "{{ message.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# asks for nothing: what tells who speaks is the answer's own
SILENT = EACH + "{{ message.role }}: {{ message.content }}\n{% endfor %}"
# its last letters and an answer's first may be one word
MELTS = (
    EACH
    + "{{ 'un' if message.role == 'assistant' }}{{ message.content }}\n{% endfor %}"
    + ("{% if add_generation_prompt %}un{% endif %}")
)
TEMPLATES = {"roles": ROLES, "marks": MARKS, "thoughts": THOUGHTS, "silent": SILENT, "melts": MELTS}
USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
TURNS = [
    {"role": "system", "content": "be brief"},
    USER,
    ASSISTANT,
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "so much the better", "weight": 0},
    {"role": "user", "content": "why"},
    {"role": "assistant", "content": "because"},
]


def tokens(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False).input_ids


def encode(messages, template=None, room=500, tokenizer=TOKENIZER, ends=(EOS,)) -> list[Example]:
    encoder = ExampleEncoder(tokenizer, frozenset(ends), chat_template=template)
    return encoder.encode({"messages": messages}, room)


def learned(example: Example, tokenizer=TOKENIZER) -> list[str]:
    """The texts that are learned, run by run."""
    runs = [[example.ids[place] for place in answer] for answer in example.answers]
    runs = runs or [[example.ids[place] for place in example.targets]]
    assert [place for answer in runs for place in answer] == [example.ids[place] for place in example.targets]
    return [tokenizer.decode(run) for run in runs]


def test_a_pair_is_the_prompt_in_its_template_and_then_the_completion():
    encoder = ExampleEncoder(TOKENIZER, frozenset({EOS}), "Q: {prompt}")
    (example,) = encoder.encode({"prompt": "ab", "completion": "cd"}, 100)
    assert example == Example((BOS, *tokens("Q: abcd"), EOS), 6)
    assert list(example.targets) == [6, 7, 8]


@pytest.mark.parametrize(
    ("template", "texts"),
    [(ROLES, [" ho", " because</s>"]), (MARKS, ["ho</s>", "because</s>"])],
)
def test_every_assistants_message_is_learned_and_nothing_else(template, texts):
    (example,) = encode(TURNS, template)
    assert learned(example) == texts
    assert example.prompt_length == example.targets[0] == example.answers[0].start
    whole = prompt.render_chat(TOKENIZER, TURNS[:-1], template)
    assert TOKENIZER.decode(example.ids).startswith(whole)


def test_an_answer_that_later_turns_show_in_another_way_is_learned_as_it_was_given():
    first, second = encode(TURNS, THOUGHTS)
    assert learned(first) == ["<think></think>ho</s>"]
    assert learned(second) == ["<think></think>because</s>"]
    assert TOKENIZER.decode(second.ids).count("<think>") == 1


def served(messages, template, tokenizer):
    """What serving encodes before each answer that is learned."""
    for place, message in enumerate(messages):
        if message["role"] == "assistant" and message.get("weight") != 0:
            shown = [{name: message[name] for name in ("role", "content")} for message in messages[:place]]
            yield prompt.encode(tokenizer, prompt.render_chat(tokenizer, shown, template), special_tokens=False)


LETTERS = ["x", "der", "\nx", "\n\nx\n", " x ", "x\n\n", "</s>x"]


@pytest.mark.parametrize("tokenizer", [TOKENIZER, BUNDLED_TOKENIZER], ids=["bytes", "merges"])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_what_stands_before_an_answer_is_what_serving_would_encode(template, tokenizer):
    for asked, answered in itertools.product(LETTERS, LETTERS):
        turns = [{**USER, "content": asked}, {**ASSISTANT, "content": answered}] * 3
        examples = encode(turns, template, tokenizer=tokenizer, ends={tokenizer.eos_token_id})
        begun = [list(ex.ids[: answer.start]) for ex in examples for answer in ex.answers or [ex.targets]]
        assert begun == list(served(turns, template, tokenizer))


def test_letters_that_melt_into_the_templates_are_not_lost():
    """`un` and `der` are other tokens together than apart; serving meets them apart."""
    turns = [USER, {**ASSISTANT, "content": "der"}]
    (example,) = encode(turns, MELTS, tokenizer=BUNDLED_TOKENIZER, ends={BUNDLED_TOKENIZER.eos_token_id})
    together = BUNDLED_TOKENIZER("hi\nunder", add_special_tokens=False).input_ids
    assert list(example.ids[:-1]) != together
    assert BUNDLED_TOKENIZER.decode(example.ids[:-1]) == BUNDLED_TOKENIZER.decode(together)
    assert learned(example, BUNDLED_TOKENIZER) == ["der<|eos|>"]


def test_the_bundled_models_own_template_is_understood():
    ends = {BUNDLED_TOKENIZER.eos_token_id}
    (example,) = encode(TURNS, tokenizer=BUNDLED_TOKENIZER, ends=ends)
    assert learned(example, BUNDLED_TOKENIZER) == [" ho", " because<|eos|>"]


def test_any_token_that_ends_a_text_ends_an_answer():
    exclamation = tokens("!")[0]
    template = EACH + "{{ message.content }}!\n{% endfor %}"
    (example,) = encode([USER, ASSISTANT, USER, ASSISTANT], template, ends=(EOS, exclamation))
    assert learned(example) == ["ho!", "ho!"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (THOUGHTS.replace("<assistant>{% endif %}", "<assistant><think>\n{% endif %}"), "another text than the one"),
        (EACH + "{{ message.content | upper }}{% endfor %}", "does not keep this answer's text"),
        (EACH + "{{ message.content[:1] }}{% endfor %}", "does not keep this answer's text"),
        ("{{ messages[0].content }}", "does not keep this answer's text"),
        (EACH + "{{ loop.length }}{{ message.content }}{% endfor %}", "another text than the one"),
        ("{{ messages[7].content + 1 }}", "does not take these messages"),
    ],
)
def test_an_answer_that_cannot_be_found_is_refused_with_the_reason(template, reason):
    with pytest.raises(InvalidTrainingData, match=reason):
        encode([USER, ASSISTANT], template)


def test_no_template_at_all_is_its_own_error():
    with pytest.raises(ChatTemplateMissing):
        encode([USER, ASSISTANT])


@pytest.mark.parametrize("room", range(2, 60))
def test_a_conversation_that_is_too_long_loses_its_beginning_and_no_answer(room):
    examples = encode(TURNS, MARKS, room)
    assert all(len(example.ids) <= room for example in examples)
    assert "".join(text for example in examples for text in learned(example)) in _cut("ho</s>", "because</s>", room)
    whole = [id for example in encode(TURNS, MARKS) for id in example.ids]
    for example in examples:
        kept = list(example.ids[1:] if example.ids[0] == BOS else example.ids)
        assert any(whole[start : start + len(kept)] == kept for start in range(len(whole)))


def _cut(first: str, second: str, room: int) -> list[str]:
    """Of an answer too long the end is lost; a token before it stays."""
    return [TOKENIZER.decode(tokens(first)[: room - 1]) + TOKENIZER.decode(tokens(second)[: room - 1])]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("room", [2, 3, 4, 7, 100])
def test_of_a_text_every_token_but_the_first_is_learned_once(bos, room):
    tokenizer = tiny_tokenizer(bos=bos)
    encoder = ExampleEncoder(tokenizer, frozenset({EOS}), "Q: {prompt}")
    examples = encoder.encode({"text": "abcdefg"}, room)
    ids = [*tokenizer("abcdefg").input_ids, EOS]
    assert [example.ids[place] for example in examples for place in example.targets] == ids[1:]
    assert max(len(example.ids) for example in examples) == min(room, len(ids))
    assert all((example.ids[0] == BOS) == bos for example in examples)


def test_a_text_of_one_token_leaves_nothing_to_learn():
    tokenizer = tiny_tokenizer(bos=False)
    tokenizer.eos_token = None
    with pytest.raises(InvalidTrainingData, match="single token"):
        ExampleEncoder(tokenizer, frozenset()).encode({"text": "a"}, 10)


START = 99
BOTH = ExampleEncoder(TOKENIZER, frozenset({EOS}), start=(START,))


def test_an_encoder_reads_the_prompt_and_the_decoder_begins_with_its_start():
    (found,) = BOTH.encode({"prompt": "ab", "completion": " cd"}, 100)
    assert found == Example((START, *tokens(" cd"), EOS), 1, source=(BOS, *tokens("ab")))
    assert list(found.targets) == [1, 2, 3, 4]
    assert (found.tokens, found.longest) == (8, 5)


def test_what_an_answer_is_forced_to_begin_with_is_read_and_not_learned():
    encoder = ExampleEncoder(TOKENIZER, frozenset({EOS}), start=(START, BOS))
    (found,) = encoder.encode({"prompt": "ab", "completion": " cd"}, 100)
    assert found.ids == (START, BOS, *tokens(" cd"), EOS)
    assert [found.ids[place] for place in found.targets] == [*tokens(" cd"), EOS]


def test_each_of_the_two_has_the_room_and_loses_its_end():
    (found,) = BOTH.encode({"prompt": "abcdefgh", "completion": " 12345678"}, 5)
    assert found == Example((START, *tokens(" 123")), 1, source=(BOS, *tokens("abcd")))


def test_the_end_that_a_tokenizer_puts_behind_a_source_stays():
    ending = tiny_tokenizer()
    ending._tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    encoder = ExampleEncoder(ending, frozenset({EOS}), start=(START,))
    (found,) = encoder.encode({"prompt": "abcdefgh", "completion": " 1"}, 5)
    assert found.source == (*tokens("abcd"), EOS)


def test_a_text_has_nothing_for_an_encoder():
    with pytest.raises(InvalidTrainingData, match="no part for the encoder"):
        BOTH.encode({"text": "abc"}, 100)


def test_each_answer_has_its_own_source():
    encoder = ExampleEncoder(TOKENIZER, frozenset({EOS}), chat_template=MARKS, start=(START,))
    found = encoder.encode({"messages": TURNS}, 500)
    learned = [turn["content"] for turn in TURNS if turn["role"] == "assistant" and turn.get("weight") != 0]
    assert [example.ids for example in found] == [(START, *tokens(text), EOS) for text in learned]
    assert [TOKENIZER.decode(example.source).count("<user>") for example in found] == [1, 3]
