from __future__ import annotations

import json
import re

import pytest

from server.engine.grammar import GrammarError, Kind, Matcher, Source, compiled, vocabulary
from tests.models import EOS, VOCABULARY, tiny_tokenizer
from tests.server.engine.grammars import RECORD, as_json, walk

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def tokens():
    return vocabulary(TOKENIZER.backend_tokenizer.to_str(), VOCABULARY, [EOS])


def matcher(tokens, source: Source) -> Matcher:
    return Matcher(compiled(source, tokens), VOCABULARY)


def regex(text: str) -> Source:
    return Source(Kind.REGEX, text)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def may_come(made: Matcher, answer: str, ends=()) -> set[int]:
    made.read(ids(answer))
    return set(made.allowed(VOCABULARY, ends).nonzero()[0].tolist())


def test_what_may_come_follows_the_answer(tokens):
    made = matcher(tokens, regex("ab?c|d"))
    assert may_come(made, "") == set(ids("ad"))
    assert may_come(made, "a") == set(ids("bc"))
    assert may_come(made, "ab") == set(ids("c"))
    assert may_come(made, "abc") == {EOS}


def test_the_text_may_end_exactly_where_the_grammar_accepts(tokens):
    made = matcher(tokens, regex("a{2,3}"))
    others = (EOS, 200, 99_999, -1)  # 200 is no text of this grammar
    assert may_come(made, "", others) == may_come(made, "a", others) == set(ids("a"))
    assert may_come(made, "aa", others) == {*ids("a"), EOS, 200}
    assert may_come(made, "aaa", others) == {EOS, 200}


def test_several_tokens_are_read_at_once_and_none_twice(tokens):
    made, other = (matcher(tokens, as_json(RECORD)) for _ in range(2))
    answer = '{"id":4'
    for size in range(len(answer)):
        may_come(made, answer[: size + 1])
    assert may_come(made, answer) == may_come(other, answer) == may_come(made, answer)
    assert set(ids("0,")) < may_come(made, answer)


def test_copies_do_not_move_one_another(tokens):
    start = compiled(regex("a+b"), tokens)
    first, second = Matcher(start, VOCABULARY), Matcher(start, VOCABULARY)
    assert may_come(first, "aab") == {EOS}
    assert may_come(second, "") == set(ids("a"))


def test_a_token_that_cannot_come_is_an_error(tokens):
    with pytest.raises(GrammarError):
        may_come(matcher(tokens, regex("ab")), "ax")


@pytest.mark.parametrize("seed", range(10))
def test_an_answer_is_of_its_kind(tokens, seed):
    def answer(kind: Kind, text: str) -> str:
        return TOKENIZER.decode(walk(matcher(tokens, Source(kind, text)), seed))

    record = json.loads(answer(Kind.JSON, json.dumps(RECORD)))
    assert record.keys() == {"id", "tags"}
    assert 0 <= record["id"] <= 99
    assert re.fullmatch(r"[a-c]{3}/[0-9]+\n[^0-9]", answer(Kind.REGEX, "[a-c]{3}/\\d+\n\\D"))
    odd = ['é"\\/\n\u0001😀', "yes", "yesterday", "a|b"]
    assert answer(Kind.CHOICE, json.dumps(odd)) in odd
    for written in ('root ::= "<" [0-9]+ ">" | "no"', 'start: "<" /[0-9]+/ ">" | "no"'):
        assert re.fullmatch("<[0-9]+>|no", answer(Kind.GRAMMAR, written))


@pytest.mark.parametrize("seed", range(5))
def test_blanks_come_to_an_end(tokens, seed):
    """Without a bound a model that likes blanks writes nothing else."""
    found = TOKENIZER.decode(walk(matcher(tokens, as_json(RECORD)), seed))
    assert all(blanks == " " or re.fullmatch(r"\n {0,20}", blanks) for blanks in re.findall(r"\s+", found))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (regex("(a"), "unclosed group"),
        (regex("(?=a)b"), "look-around"),
        (regex(r"(a)\1"), "backreferences"),
        (regex(r"[^\s\S]"), "no text can match it"),
        (as_json({"type": "foo"}), "Invalid type: foo"),
        (as_json({"type": "array", "uniqueItems": True}), 'Unimplemented keys: ["uniqueItems"]'),
        (as_json({"type": "integer", "minimum": 5, "maximum": 3}), "minimum (5) is greater than maximum (3)"),
        (as_json({"$ref": "#/nope"}), "'/nope' does not exist"),
        (as_json({"oneOf": [{"type": "string"}, {"enum": ["a"]}]}), "oneOf: one answer might be of two"),
        (as_json({"x-guidance": {"lenient": True}, "not": {"type": "null"}}), 'Unimplemented keys: ["not"]'),
        (as_json({"x-guidance": {"coerce_one_of": True}, "oneOf": [{}, {}]}), "oneOf: one answer might be of two"),
        (as_json({"$ref": "http://127.0.0.1:9/x"}), "not present"),
        (as_json({"$ref": "#"}), "no text can match it"),
        (as_json([]), "object schema"),
        (Source(Kind.JSON, "{"), "EOF"),
        (Source(Kind.GRAMMAR, "start: b"), "b"),
    ],
)
def test_what_is_wrong_with_a_grammar_is_said_in_a_line(tokens, source, said):
    with pytest.raises(GrammarError, match=re.escape(said)) as error:
        matcher(tokens, source).read([])
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_cannot_be_read_is_an_error():
    with pytest.raises(GrammarError, match="cannot be constrained"):
        vocabulary("{}", VOCABULARY, [EOS])
    with pytest.raises(GrammarError, match="cannot be constrained"):
        vocabulary(TOKENIZER.backend_tokenizer.to_str(), VOCABULARY - 1, [EOS])


def test_ids_that_have_no_token_never_come(tokens):
    """A model may have more logits than its tokenizer has tokens, or fewer."""
    wide = vocabulary(TOKENIZER.backend_tokenizer.to_str(), VOCABULARY + 30, [EOS])
    made = Matcher(compiled(regex("(?s:.)*"), wide), wide.vocab_size)
    made.read([])
    assert made.allowed(VOCABULARY + 50)[VOCABULARY:].sum() == 0
    assert made.allowed(VOCABULARY + 50)[EOS]
    assert len(made.allowed(7)) == 7
