from __future__ import annotations

import json
import os
import random
import time

import pytest

from prefix_store.errors import Overloaded
from server.engine import grammar_trial
from server.engine.grammar import GrammarError, Kind, Source, compiled, vocabulary
from server.engine.grammar_trial import MOST_BYTES, Trials, _walk
from tests.models import EOS, VOCABULARY, tiny_tokenizer
from tests.server.engine.grammars import RECORD, as_json

FINE = as_json(RECORD)


def parts() -> tuple[str, int, list[int]]:
    return tiny_tokenizer().backend_tokenizer.to_str(), VOCABULARY, [EOS]


@pytest.fixture(scope="module")
def trials():
    made = Trials(*parts())
    yield made
    made.close()


def nested(depth: int) -> Source:
    schema: dict = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return as_json(schema)


def chained(length: int, **link) -> Source:
    """Each definition refers to the next one by way of `link`."""
    defs = {f"d{i}": json.loads(json.dumps(link or "#").replace('"#"', f'{{"$ref": "#/$defs/d{i + 1}"}}'))
            for i in range(length)}  # fmt: skip
    return as_json({"$ref": "#/$defs/d0", "$defs": {**defs, f"d{length}": {"type": "integer"}}})


def regex(text: str) -> Source:
    return Source(Kind.REGEX, text)


HOSTILE = {
    "a chain of references": (chained(20_000), "too deep"),
    "a chain of objects": (chained(10_000, type="object", properties={"a": "#"}, required=["a"]), "too deep"),
    "a chain of alternatives": (chained(3000, anyOf=["#", "#"]), "too deep"),
    "a chain of sums": (chained(3000, allOf=["#", "#"]), "too deep"),
    "a deep schema": (nested(190), "recursion"),
    "a large divisor": (as_json({"type": "integer", "multipleOf": 99_999_989}), "takes"),
    "two divisors": (as_json({"allOf": [{"type": "integer", "multipleOf": n} for n in (1009, 1013)]}), "takes"),
    "a huge enum": (as_json({"enum": [f"{i:x}{i:o}" for i in range(80_000)]}), "."),
    "many properties": (
        as_json({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(5000)}}), "."
    ),
    "counts of counts": (regex("(x{1000}){1000}"), "."),
    "more of them": (regex("((((x{100}){100}){100}){100})"), "."),
    "many parentheses": (regex("(" * 100_000 + "a" + ")" * 100_000), "nested"),
    "many dots": (regex("." * 1_000_000), "."),
    "a chain of rules": (
        Source(Kind.GRAMMAR, "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(20_000)) + 'r20000: "a"'),
        "too deep",
    ),
    "doubled rules": (
        Source(Kind.GRAMMAR, "start: R0\n" + "".join(f"R{i}: R{i + 1} R{i + 1}\n" for i in range(40)) + 'R40: "a"'), "."
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_refused_soon_and_harms_nobody(trials, name):
    source, said = HOSTILE[name]
    trials.run(FINE)
    process, begun = trials._process.pid, time.monotonic()
    with pytest.raises(GrammarError, match=said):
        trials.run(source)
    assert time.monotonic() - begun < 20
    assert trials.run(FINE) < MOST_BYTES
    assert trials._process.pid == process


@pytest.mark.parametrize(
    "source",
    [
        FINE,
        nested(100),
        chained(100),
        chained(20, anyOf=["#", "#"]),
        as_json({"type": "object"}),
        as_json({"enum": [f"{i:x}{i:o}" for i in range(5000)]}),
        as_json({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(100)}}),
        as_json({"$ref": "#/$defs/n", "$defs": {"n": {"type": "array", "items": {"$ref": "#/$defs/n"}}}}),
        regex("(a|b)*a(a|b){30}"),
        regex(r"\d{4}-\d\d-\d\d"),
        regex(""),
    ],
)  # fmt: skip
def test_what_people_ask_for_is_not_refused(trials, source):
    assert trials.run(source) < MOST_BYTES


def test_a_larger_grammar_weighs_more(trials):
    small, large = (trials.run(as_json({"enum": [f"{i:x}{i:o}" for i in range(n)]})) for n in (10, 5000))
    assert large > small + (1 << 20)


def test_a_grammar_that_is_slow_to_follow_is_refused(monkeypatch):
    tokens = vocabulary(*parts())
    start = compiled(FINE, tokens)
    _walk(start, tokens, random.Random(0))
    monkeypatch.setattr(grammar_trial, "STEP_SECONDS", 0)
    with pytest.raises(GrammarError, match="a token to follow"):
        _walk(start, tokens, random.Random(0))


def test_the_process_starts_with_the_first_trial_and_is_started_again_when_it_is_lost():
    trials = Trials(*parts())
    assert trials._process is None
    trials.run(FINE)
    os.kill(trials._process.pid, 9)
    trials._process.wait()
    with pytest.raises(Overloaded):
        trials.run(FINE)
    trials.run(FINE)
    process = trials._process
    trials.close()
    trials.close()
    assert process.returncode is not None


def test_a_tokenizer_that_cannot_be_read_is_said_of_each_grammar():
    trials = Trials("{}", VOCABULARY, [EOS])
    for _ in range(2):
        with pytest.raises(GrammarError, match="tokenizer"):
            trials.run(FINE)
    trials.close()
