from __future__ import annotations

import json
import random
import re
from dataclasses import replace

import pytest
import torch

from server.engine.adjustments import adjust
from server.engine.batch import Selection
from server.engine.constraints import constrain, read_on
from server.engine.engine import Engine
from server.engine.grammar import Grammar, GrammarError
from server.engine.grammars import Grammars
from server.engine.sampler import sample
from server.scheduler.messages import FinishReason, PrefixPayload
from server.scheduler.plan import Row
from server.scheduler.scheduler import Limits
from server.scheduler.sequence import Sequence
from tests.models import EOS, VOCABULARY, random_kv, tiny_frozen
from tests.server.engine.grammars import RECORD, as_json, grammar, request, run, text

LIMITS = Limits(slots=4096, rows=16, step_tokens=64, context_length=400, waiting=100)
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny_frozen("llama"), LIMITS)


@pytest.fixture(scope="module")
def grammars(engine):
    made = Grammars(engine.frozen)
    yield made
    made.close()


def prefix(engine, digest: str, length: int = 6) -> PrefixPayload:
    return PrefixPayload(digest, length, length, False, random_kv(engine.frozen, length, seed=len(digest)))


def sequence(made: Grammar | None, answer: str = "", **params) -> Sequence:
    found = Sequence(request("r", made, (7,), **params), 0, frozenset({EOS}))
    found.tokens.extend(tiny_frozen().tokenizer.encode(answer, add_special_tokens=False))
    return found


def left(*sequences: Sequence) -> list[set[str]]:
    """What each may say next, the end as a full stop."""
    logits = torch.zeros(len(sequences), VOCABULARY)
    assert read_on(sequences) == {}
    adjust(logits, sequences)
    tokenizer = tiny_frozen().tokenizer
    ids = [row.isfinite().nonzero().flatten().tolist() for row in logits]
    return [{"." if token == EOS else tokenizer.decode([token]) for token in row} for row in ids]


def test_each_row_has_its_own_grammar_and_some_have_none(grammars):
    made = grammar(grammars, "ab|cd")
    rows = [sequence(made), sequence(None), sequence(made, "c"), sequence(grammar(grammars, "a*"), "a")]
    first, free, third, fourth = left(*rows)
    assert (first, third, fourth) == ({"a", "c"}, {"d"}, {"a", "."})
    assert len(free) > 100


@pytest.mark.parametrize(
    ("params", "answer", "expected"),
    [
        ({}, "a", {"a", "."}),
        ({"min_tokens": 3}, "a", {"a"}),
        ({"min_tokens": 3}, "aaa", {"a", "."}),
        ({"min_tokens": 9}, "aaaa", {"."}),  # nothing else could come
        ({"ignore_eos": True}, "aaa", {"a"}),
        ({"ignore_eos": True}, "aaaa", {"."}),
        ({"ignore_eos": True, "stop_token_ids": frozenset({EOS})}, "a", {"a", "."}),
        ({"logit_bias": ((5, 100.0), (EOS, 100.0))}, "", {"a"}),
        ({"repetition_penalty": 3.0, "presence_penalty": 2.0}, "aaaa", {"."}),
    ],
)
def test_what_else_is_asked_holds_as_long_as_something_may_come(grammars, params, answer, expected):
    assert left(sequence(grammar(grammars, "a{1,4}"), answer, **params)) == [expected]


def test_stop_tokens_may_come_where_the_answer_may_end(grammars):
    made = grammar(grammars, "ab?")
    asked = {"stop_token_ids": frozenset({200, 2**62})}
    ended = tiny_frozen().tokenizer.decode([200])
    assert left(sequence(made, "", **asked), sequence(made, "a", **asked)) == [{"a"}, {"b", ".", ended}]
    # with `min_tokens` they are held back too
    assert left(sequence(made, "a", min_tokens=5, **asked)) == [{"b"}]
    assert left(sequence(made, "ab", min_tokens=5, **asked)) == [{".", ended}]


def test_a_row_of_logits_wider_or_narrower_than_the_tokens_is_constrained_too(grammars):
    for width in (VOCABULARY + 9, 150):
        row = sequence(grammar(grammars, "[ab]"))
        read_on([row])
        logits = torch.zeros(1, width)
        constrain(logits, [row])
        assert logits.isfinite().sum() == 2


@pytest.mark.parametrize("seed", range(12))
def test_a_row_without_grammar_is_the_same_to_the_last_bit_beside_rows_with_one(grammars, seed):
    draw = random.Random(seed)
    logits = 3 * torch.randn(12, VOCABULARY, generator=torch.Generator().manual_seed(seed))

    def row(index: int, made: Grammar | None) -> Sequence:
        chosen = {"temperature": [0.0, 0.7, 1.2][index % 3], "top_k": [0, 4][index % 2], "top_p": [1.0, 0.8][index % 2]}
        return sequence(made, seed=index, logprobs=index % 3, min_tokens=index % 5, **chosen)

    def results(rows: dict[int, Sequence]) -> dict:
        chosen = [Selection(Row(found, 0, 1), place, 1) for place, found in enumerate(rows.values())]
        return dict(zip(rows, sample(logits[list(rows)], chosen).read(), strict=True))

    constrained = set(draw.sample(range(12), 6))
    texts = ["[ab]+", "x|y", '"[^"]*"']
    grammar_of = {i: grammar(grammars, texts[i % 3]) if i in constrained else None for i in range(12)}
    together = results({i: row(i, grammar_of[i]) for i in range(12)})
    assert {i: found for i, found in together.items() if i not in constrained} == results(
        {i: row(i, None) for i in range(12) if i not in constrained}
    )
    for i in range(12):
        assert results({i: row(i, grammar_of[i])})[i] == together[i]


def test_logprobs_are_the_models_own(grammars):
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(0))
    row = sequence(grammar(grammars, "a"), temperature=0.0, logprobs=2)
    result = sample(logits, [Selection(Row(row, 0, 1), 0, 1)]).read()[0]
    own = logits[0].log_softmax(-1)
    assert result.token_id == tiny_frozen().tokenizer.encode("a", add_special_tokens=False)[0]
    assert result.logprob.logprob == pytest.approx(float(own[result.token_id]))
    assert [token for token, _ in result.logprob.top] == own.topk(2).indices.tolist()


def test_a_grammar_that_cannot_be_followed_fails_its_row_alone(grammars, monkeypatch):
    made, other = grammar(grammars, "a+b"), grammar(grammars, "c+")
    rows = [sequence(made), sequence(other), sequence(None)]
    rows[0].matcher = made.matcher()

    def fail(answer: list[int]) -> None:
        raise GrammarError("too many states")

    monkeypatch.setattr(rows[0].matcher, "read", fail)
    logits = torch.zeros(3, VOCABULARY)
    first, *rest = sample(logits, [Selection(Row(row, 0, 1), place, 1) for place, row in enumerate(rows)]).read()
    assert first.token_id is None
    assert "too many states" in first.error.message
    assert all(result.error is None and result.token_id is not None for result in rest)
    assert (made.is_spoilt, other.is_spoilt) == (True, False)


@pytest.mark.parametrize("temperature", [0.0, 0.9, 2.0])
def test_an_answer_is_of_its_schema_and_without_it_is_not(engine, grammars, temperature):
    made = grammar(grammars, as_json(RECORD))
    asked = {str(seed): request(str(seed), made, seed=seed, temperature=temperature) for seed in range(6)}
    for tokens, reason in run(engine, asked.values()).values():
        assert reason is STOP
        assert json.loads(text(engine.frozen, tokens)).keys() == {"id", "tags"}
    for tokens, _ in run(engine, [replace(one, grammar=None) for one in asked.values()]).values():
        with pytest.raises(ValueError):
            json.loads(text(engine.frozen, tokens))


def test_an_answer_that_is_cut_off_says_so(engine, grammars):
    made = grammar(grammars, as_json(RECORD))
    tokens, reason = run(engine, [request("r", made, max_tokens=5)])["r"]
    assert (len(tokens), reason) == (5, LENGTH)
    # where the text is whole but more could follow, the last token is that of the limit
    assert run(engine, [request("r", grammar(grammars, "a{3}"), max_tokens=3)])["r"][1] is LENGTH
    assert run(engine, [request("r", grammar(grammars, "a{3}"), max_tokens=4)])["r"][1] is STOP


def test_min_tokens_and_ignore_eos_lengthen_an_answer_as_far_as_its_grammar_goes(engine, grammars):
    made = grammar(grammars, "[ab]{1,20}")
    bias = ((EOS, 100.0),)
    short, long, longest, held = (
        len(run(engine, [request("r", made, logit_bias=bias, **params)])["r"][0])
        for params in ({}, {"min_tokens": 9}, {"ignore_eos": True}, {"min_tokens": 50})
    )
    assert (short, long, longest, held) == (1, 9, 20, 20)


def mixture(engine: Engine, grammars: Grammars, count: int = 14) -> list:
    """Rows with and without a grammar and a prefix, drawn and greedy."""
    sources = [None, as_json(RECORD), "[ab]{5,40}", None, as_json({"type": "array", "items": {"type": "boolean"}})]
    prefixes = [None, prefix(engine, "x"), prefix(engine, "yy")]
    made = [grammar(grammars, source) if source is not None else None for source in sources]
    return [
        request(
            str(i), made[i % 5], range(5, 8 + i), prefixes[i % 3], seed=i, max_tokens=40, temperature=[0.0, 0.8][i % 2]
        )
        for i in range(count)
    ]


def test_a_mixed_batch_answers_each_row_as_alone(engine, grammars):
    rows = mixture(engine, grammars)
    together = run(engine, rows)
    for row in rows:
        assert run(engine, [row])[row.id] == together[row.id]
    free = [row for row in rows if row.grammar is None]
    assert {row.id: together[row.id] for row in free} == run(engine, free)
    # the grammars are what makes the difference
    bare = run(engine, [replace(row, grammar=None) for row in rows])
    assert all((bare[row.id] == together[row.id]) == (row.grammar is None) for row in rows)


def test_a_preempted_row_goes_on_in_its_grammar(grammars, engine):
    made = grammar(grammars, "([ab]{9}-){10}!")
    rows = [request(str(i), made if i % 2 else None, seed=i, max_tokens=110, ignore_eos=True) for i in range(6)]
    small = Engine(tiny_frozen("llama"), replace(LIMITS, slots=320, context_length=200))
    assert run(small, rows) == run(engine, rows)
    assert small.scheduler.admission.preemptions > 0


def test_after_an_abort_others_go_on(engine, grammars):
    made = grammar(grammars, "[ab]{30}c")
    for name in "xyz":
        engine.scheduler.add(request(name, made, seed=ord(name)), ord(name))
    for _ in range(5):
        engine.step()
    engine.scheduler.abort("y", FinishReason.ABORT)
    ended = {}
    while len(ended) < 2:
        ended |= {event.request_id: event.finish_reason for event in engine.step() if event.finish_reason}
    assert ended == {"x": STOP, "z": STOP}
    tokens, reason = run(engine, [request("x", made, seed=ord("x"))])["x"]
    assert reason is STOP
    assert re.fullmatch("[ab]{30}c", text(engine.frozen, tokens))
