from __future__ import annotations

import subprocess
import sys

import pytest

from prefix_store.errors import InvalidRequest, Overloaded
from server.engine.grammar import GrammarError, Kind, Source
from server.engine.grammars import GROWTH_BYTES, LONGEST_SOURCE, REFUSED_SECONDS, Grammars
from tests.models import tiny_frozen
from tests.server.engine.grammars import RECORD, as_json, grammar

FROZEN = tiny_frozen("llama")


@pytest.fixture
def grammars():
    made = Grammars(FROZEN)
    yield made
    made.close()


def test_a_grammar_is_compiled_once_for_each_tenant(grammars):
    made = grammar(grammars, as_json(RECORD))
    assert grammar(grammars, as_json(RECORD)) is made is grammars.find("t", as_json(RECORD), "asked")
    assert grammars.find("other", as_json(RECORD), "asked") is None
    assert grammar(grammars, as_json(RECORD), "other") is not made
    # the same text as something else is something else
    assert grammars.find("t", Source(Kind.REGEX, as_json(RECORD).text), "asked") is None


def test_one_that_could_not_be_followed_is_compiled_anew(grammars):
    made = grammar(grammars, "a+")
    made.is_spoilt = True
    assert grammars.find("t", Source(Kind.REGEX, "a+"), "asked") is None
    assert grammar(grammars, "a+") is not made


def test_the_oldest_go_when_there_are_too_many():
    grammars = Grammars(FROZEN, budget_bytes=3 * GROWTH_BYTES + GROWTH_BYTES // 2)
    for text in "abc":
        grammar(grammars, text)
    grammar(grammars, "a")  # used again
    grammar(grammars, "d")
    kept = {text for text in "abcd" if grammars.find("t", Source(Kind.REGEX, text), "asked") is not None}
    assert kept == {"a", "c", "d"}
    grammars.close()


def test_what_is_wrong_is_a_bad_request(grammars):
    for source in ("(a", Source(Kind.REGEX, "a" * (LONGEST_SOURCE + 1)), as_json({"type": "foo"})):
        with pytest.raises(InvalidRequest, match=r"^asked: ") as error:
            grammar(grammars, source)
        assert error.value.param == "asked"


def test_what_a_trial_refuses_is_not_compiled_here(grammars, monkeypatch):
    """It would end this process."""

    def refuse(source: Source) -> int:
        raise GrammarError("it is too deep")

    grammar(grammars, "a")
    monkeypatch.setattr(grammars._trials, "run", refuse)
    monkeypatch.setattr("server.engine.grammars.compiled", lambda *_: pytest.fail("compiled"))
    with pytest.raises(InvalidRequest, match="too deep"):
        grammar(grammars, "b")


def test_what_was_refused_is_not_tried_again_for_a_while_whoever_asks(monkeypatch):
    now, tried = [100.0], []
    grammars = Grammars(FROZEN, clock=lambda: now[0])
    grammar(grammars, "a")
    run = grammars._trials.run
    monkeypatch.setattr(grammars._trials, "run", lambda source: tried.append(source.text) or run(source))
    for tenant in ("t", "t", "other"):
        with pytest.raises(InvalidRequest, match=r"asked: .*unclosed group"):
            grammar(grammars, "(a", tenant)
    with pytest.raises(InvalidRequest, match=r"elsewhere: .*unclosed group") as error:
        grammars.find("t", Source(Kind.REGEX, "(a"), "elsewhere")
    assert (error.value.param, tried) == ("elsewhere", ["(a"])
    assert grammars.find("t", Source(Kind.GRAMMAR, "(a"), "asked") is None  # the same text as something else
    now[0] += REFUSED_SECONDS
    with pytest.raises(InvalidRequest, match="unclosed group"):
        grammar(grammars, "(a")
    assert tried == ["(a", "(a"]
    grammars.close()


def test_a_trial_that_could_not_be_made_is_no_refusal(grammars, monkeypatch):
    grammar(grammars, "a")
    run = grammars._trials.run

    def busy(source: Source) -> int:
        raise Overloaded("no grammar could be tried in time; try again")

    monkeypatch.setattr(grammars._trials, "run", busy)
    with pytest.raises(Overloaded):
        grammar(grammars, "b")
    monkeypatch.setattr(grammars._trials, "run", run)
    assert grammar(grammars, "b") is not None


def test_refusals_do_not_pile_up(grammars, monkeypatch):
    monkeypatch.setattr("server.engine.grammars.MOST_REFUSALS", 2)
    tried = []
    grammar(grammars, "a")
    run = grammars._trials.run
    monkeypatch.setattr(grammars._trials, "run", lambda source: tried.append(source.text) or run(source))
    for text in ("(a", "(b", "(c", "(a"):
        with pytest.raises(InvalidRequest):
            grammar(grammars, text)
    assert tried == ["(a", "(b", "(c", "(a"]
    assert len(grammars._refused) == 2


def test_nothing_is_made_before_it_is_asked_for(grammars):
    assert (grammars._tokens, grammars._trials) == (None, None)
    grammars.close()


def test_without_the_library_the_engine_runs_and_a_request_is_told_what_to_install():
    code = """
import sys; sys.modules["llguidance"] = None
import server.engine.loop
from server.engine.grammars import Grammars
from server.engine.grammar import Kind, Source
from tests.models import tiny_frozen
try: Grammars(tiny_frozen("llama")).compile("t", Source(Kind.REGEX, "a"), "response_format")
except Exception as error: print(type(error).__name__, error)
"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.startswith("InvalidRequest response_format needs the package llguidance")
    assert "pip install llguidance" in said
