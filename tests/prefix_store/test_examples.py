import json
import re

import pytest

from prefix_store import examples
from prefix_store.errors import InvalidTrainingData
from prefix_store.examples import canonical, parse, to_jsonl

PAIR = {"prompt": "2+2=", "completion": "4"}
USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
CHAT = {"messages": [USER, ASSISTANT]}


def chat(*messages):
    return {"messages": list(messages)}


@pytest.mark.parametrize(
    ("example", "kept"),
    [
        ({"completion": "4", "prompt": ""}, '{"prompt":"","completion":"4"}'),
        ({"text": "Grüße\u2028"}, '{"text":"Grüße\u2028"}'),
        ({"text": "a", "prompt": None, "messages": None}, '{"text":"a"}'),
        (CHAT, '{"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"ho"}]}'),
        (
            chat(
                {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "role": "user"}, ASSISTANT
            ),
            '{"messages":[{"role":"user","content":"a\\nb"},{"role":"assistant","content":"ho"}]}',
        ),
        (
            chat(USER, {**ASSISTANT, "weight": 0, "name": "A"}, USER, {**ASSISTANT, "weight": 1}),
            '{"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"ho","name":"A","weight":0},'
            '{"role":"user","content":"hi"},{"role":"assistant","content":"ho"}]}',
        ),
    ],
)
def test_an_example_is_kept_in_one_way(example, kept):
    assert to_jsonl([example]).decode() == kept + "\n"
    assert list(examples.from_jsonl(to_jsonl([example]))) == [canonical(example)]
    assert canonical(canonical(example)) == canonical(example)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ([1], f"expected an object {re.escape(examples.EXPECTED)}, got a list"),
        (None, "got null"),
        ({}, "got an object with nothing"),
        ({**PAIR, "prompt": None}, "got an object with 'completion', and null as 'prompt'"),
        ({"prompt": "a"}, "got an object with 'prompt'"),
        ({**PAIR, "weight": "1"}, "'weight' is no field beside 'prompt' and 'completion'"),
        ({**{f"x{n}": n for n in range(9)}, **PAIR}, "'x0' is no field beside 'prompt' and 'completion'"),
        ({"text": "a", "meta": {}}, "'meta' is no field beside 'text'"),
        ({"messages": [], "tools": []}, "'tools' is no field beside 'messages'"),
        ({"prompt": "a", "text": "b"}, "got an object with 'prompt', 'text'"),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": 3, "completion": "b"}, "prompt must be a text, got a number"),
        ({"prompt": "\ud800", "completion": "b"}, "prompt is not valid Unicode"),
        ({"text": ""}, "text is empty"),
        ({"text": ["a"]}, "text must be a text, got a list"),
        ({"messages": "hi"}, "messages must be a list, got a text"),
        ({"messages": []}, "no message of an assistant to learn from"),
        (chat(USER), "no message of an assistant to learn from"),
        (chat(USER, {**ASSISTANT, "weight": 0}), "for all have weight 0"),
        (chat(USER, "ho"), r"messages\[1\] must be an object with role and content, got a text"),
        (chat({"role": "bot", "content": "x"}), r"messages\[0\].role must be one of system, .*, got 'bot'"),
        (chat({"role": None, "content": "x"}), r"messages\[0\].role must be one of system, .*, got null"),
        (chat({"role": ["user"], "content": "x"}), r"messages\[0\].role .* got a list"),
        (chat(USER, {"role": "assistant"}), r"messages\[1\].content must be a text, got null"),
        (chat(USER, {"role": "assistant", "content": " "}), r"messages\[1\].content is empty"),
        (
            chat({"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT),
            r"messages\[0\].content\[0\] must be a part of type 'text', got a part of type 'image_url'",
        ),
        (
            chat({"role": "user", "content": [{"type": "text", "text": "a"}, None]}, ASSISTANT),
            r"messages\[0\].content\[1\] must be a part of type 'text', got null",
        ),
        (
            chat({"role": "user", "content": [{"type": "text"}]}, ASSISTANT),
            r"messages\[0\].content\[0\].text must be a text, got null",
        ),
        (chat(USER, {**ASSISTANT, "tool_calls": []}), r"messages\[1\] has the field 'tool_calls'; known are role"),
        (chat(USER, {**ASSISTANT, "weight": 0.5}), "weight must be 0 or 1"),
        (
            chat(USER, {**ASSISTANT, "weight": True}),
            "weight must .*, got a truth value in one of role assistant",
        ),
        (
            chat({**USER, "weight": 1}, ASSISTANT),
            "weight must be 0 or 1 and stand in an assistant's message, got 1 in one of role user",
        ),
        (chat(ASSISTANT, USER, ASSISTANT), r"messages\[0\] is an assistant's, and nothing stands before it"),
        (chat({**USER, "name": ""}, ASSISTANT), r"messages\[0\].name is empty"),
    ],
)
def test_a_bad_example_is_named_by_its_line_and_by_what_is_wrong(example, message):
    with pytest.raises(InvalidTrainingData, match=f"^line 3: .*{message}") as caught:
        to_jsonl([PAIR, CHAT, example])
    assert caught.value.param == "examples"
    with pytest.raises(InvalidTrainingData, match=f"^validation_examples, line 1: .*{message}") as caught:
        to_jsonl([example], examples.VALIDATION)
    assert caught.value.param == "validation_examples"


def test_too_much_is_refused(monkeypatch):
    monkeypatch.setattr(examples, "MOST_EXAMPLES", 2)
    assert to_jsonl([PAIR] * 2)
    with pytest.raises(InvalidTrainingData, match="more than 2 examples"):
        to_jsonl([PAIR] * 3)
    monkeypatch.setattr(examples, "MOST_BYTES", 60)
    with pytest.raises(InvalidTrainingData, match="up to line 2 take more than 0 MB"):
        to_jsonl([PAIR] * 2)
    monkeypatch.setattr(examples, "MOST_MESSAGES", 1)
    with pytest.raises(InvalidTrainingData, match="at most 1, got 2"):
        canonical(CHAT)


def test_a_file_may_mix_shapes_and_have_blank_lines():
    lines = [json.dumps(example) for example in (PAIR, CHAT, {"text": "a"})]
    found, faults = parse(("\ufeff" + "\n \n".join(lines) + "\r\n").encode())
    assert (found, faults) == ([PAIR, CHAT, {"text": "a"}], [])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "not JSON (Expecting property name enclosed in double quotes at column 2)"),
        (b"\xff\xfe{", "not UTF-8"),
        (b"[" * 100_000, "not JSON"),
        (b"1" * 10_000, "not JSON"),
        (b'{"text": "a", "text": "b"}', "'text' is given more than once"),
        (b'{"messages": [{"role": "user", "role": "user"}]}', "'role' is given more than once"),
        (b'{"text": "\\ud800"}', "text is not valid Unicode"),
    ],
)
def test_a_line_that_is_no_example_is_named(line, said):
    found, (fault,) = parse(b'{"text": "a"}\n\n' + line)
    assert found == [{"text": "a"}]
    assert fault.startswith(f"line 3: {said}")


def test_no_more_faults_are_told_than_can_be_read():
    found, faults = parse(b"{}\n" * 3 + b'{"text": "a"}\n' + b"{}\n" * 100)
    assert found == [{"text": "a"}]
    assert [fault.partition(":")[0] for fault in faults] == ["line 1", "line 2", "line 3", "line 5", "line 6"]


def test_no_more_examples_are_read_than_there_may_be(monkeypatch):
    monkeypatch.setattr(examples, "MOST_EXAMPLES", 2)
    lines = b'{"text": "a"}\n'
    assert examples.read(lines * 2 + b"\n", "file") == [{"text": "a"}] * 2
    with pytest.raises(InvalidTrainingData, match=r"^line 3: there are more than 2 examples$") as caught:
        examples.read(lines * 3 + b"no json" * 9, "file")
    assert caught.value.param == "file"
    with pytest.raises(InvalidTrainingData, match=r"^line 1: .*; line 2: not JSON"):
        examples.read(b"{}\nx\n", "file")
    with pytest.raises(InvalidTrainingData, match=r"^the file has no examples$"):
        examples.read(b"\n \n", "file")


def test_a_user_s_words_are_never_repeated_in_full():
    with pytest.raises(InvalidTrainingData) as caught:
        canonical({"x" * 1000: 1, "y" * 1000: 2})
    assert len(caught.value.message) < 300
