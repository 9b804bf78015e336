"""Beams over an encoder-decoder model in a mixed batch find what transformers' `generate` finds for each alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from prefix_store.geometry import Stack
from prefix_store.model import sites
from server.api.prompts import fields
from server.scheduler.beams import BeamGroup
from server.scheduler.messages import FinishReason, GenerationRequest
from tests.models import BOS, ENCODER_DECODERS, EOS, random_kvs, tiny_frozen, tiny_model
from tests.parity.beams import Search, answers, drawn, hypotheses, run
from tests.parity.harness import a_few, make_engine
from tests.parity.stacks import Prefix, behind

SETS = [(), (Stack.SELF,), (Stack.CROSS,), (Stack.ENCODER,), tuple(Stack), "prompt"]
FAMILIES = [pytest.param(name, marks=() if name in ("bart", "t5") else pytest.mark.slow) for name in ENCODER_DECODERS]


class Family:
    """A model to serve, and the plain one that searches for one request at a time, both with a config's `rules`."""

    def __init__(self, name: str, **rules: Any) -> None:
        self.name, self.served, self.plain = name, tiny_frozen(name), tiny_model(name)
        sites.mark(self.plain)
        for model in (self.served.model, self.plain):
            model.generation_config.update(**rules)

    def prefix(self, index: int, length: int) -> Prefix:
        """Of each set of stacks in turn, moving the answer's positions or not."""
        kind = SETS[index % len(SETS)]
        if kind == "prompt":
            generator = torch.Generator().manual_seed(length)
            return Prefix(embeds=torch.randn(length, self.served.geometry.hidden_size, generator=generator))
        if not kind:
            return Prefix()
        stacks = random_kvs(self.served, length, seed=length, stacks=kind)
        return Prefix(stacks, length if index % 2 else 0)

    def request(self, index: int, search: Search, prefix: Prefix) -> GenerationRequest:
        payload = prefix.payload(f"{index}") if prefix.stacks or prefix.embeds is not None else None
        made = search.request(f"{index}", payload)
        # a forced end is for who does not ignore the model's own
        params = replace(made.params, ignore_eos=self.served.last_id is None)
        return replace(made, params=params, **fields(search.prompt, self.served))

    @torch.inference_mode()
    def by_transformers(self, search: Search, prefix: Prefix) -> list[tuple[list[int], float]]:
        start, forced = torch.tensor([[self.served.start_id]]), len(self.served.start_ids) - 1
        longer = replace(search, new=search.new + forced, least=search.least and search.least + forced)
        with behind(self.plain, search.prompt, prefix) as states:
            found = self.plain.generate(
                encoder_outputs=states, decoder_input_ids=start, use_cache=False, **longer.options()
            )
        return search.answers(found, 1, forced)

    def disagreements(self, searches: Sequence[Search], expected: Sequence[list[Any]], given: Sequence[Prefix]) -> int:
        """How many searches behind what they are given find anything else than what is expected of each alone."""
        requests = [self.request(*each) for each in zip(range(len(searches)), searches, given, strict=True)]
        events = run(make_engine(self.served), requests, [search.arrives for search in searches])
        return sum(
            answers(events[made.id]) != [ids for ids, _ in found]
            for made, found in zip(requests, expected, strict=True)
        )


@pytest.fixture(scope="module", name="family", params=FAMILIES)
def each_family(request: pytest.FixtureRequest) -> Family:
    return Family(request.param)


@pytest.fixture(scope="module", params=a_few(ENCODER_DECODERS))
def some_family(request: pytest.FixtureRequest) -> Family:
    return Family(request.param)


def test_beams_among_rows_of_other_prefixes_find_what_each_finds_alone(family):
    searches = drawn(0, 12)
    prefixes = [family.prefix(index, search.prefix or 4) for index, search in enumerate(searches)]
    requests = [family.request(*each) for each in zip(range(12), searches, prefixes, strict=True)]
    events = run(make_engine(family.served), requests, [search.arrives for search in searches])
    for made, search, prefix in zip(requests, searches, prefixes, strict=True):
        found, expected = hypotheses(events[made.id]), family.by_transformers(search, prefix)
        assert [list(answer.token_ids) for answer in found] == [ids for ids, _ in expected], search
        assert [answer.score for answer in found] == pytest.approx([score for _, score in expected], rel=1e-4, abs=1e-5)


RULES = {
    "forced_bos_token_id": BOS,
    "forced_eos_token_id": EOS,
    "bad_words_ids": [[EOS], [60], [61]],  # of which transformers lets the end come
}


@pytest.mark.parametrize(
    "names", [("forced_bos_token_id",), ("forced_eos_token_id",), ("bad_words_ids",), tuple(RULES)]
)
def test_beams_find_what_transformers_finds_by_the_rules_of_the_generation_config(some_family, names):
    """A forced beginning is no part of the answer here and one there, in scores and in lengths: as many are free."""
    ruled = Family(some_family.name, **{name: RULES[name] for name in names})
    many = [drawn(7 + index, 4, ends=(EOS,), length_penalty=penalty) for index, penalty in enumerate((1.0, 2.0, -1.0))]
    searches = [search for several in many for search in several if search.new > 1]
    prefixes = [ruled.prefix(index, search.prefix or 4) for index, search in enumerate(searches)]
    requests = [ruled.request(*each) for each in zip(range(len(searches)), searches, prefixes, strict=True)]
    events = run(make_engine(ruled.served), requests, [search.arrives for search in searches])
    for made, search, prefix in zip(requests, searches, prefixes, strict=True):
        found, expected = hypotheses(events[made.id]), ruled.by_transformers(search, prefix)
        assert [list(answer.token_ids) for answer in found] == [ids for ids, _ in expected], search
        assert [answer.score for answer in found] == pytest.approx([score for _, score in expected], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("rules", [("forced_eos_token_id",), ("forced_bos_token_id", "forced_eos_token_id")])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -1.0])
def test_where_only_the_forced_end_has_room_all_answers_are_empty_as_in_transformers(family, rules, length_penalty):
    ruled = Family(family.name, **{name: RULES[name] for name in rules})
    search = Search((5, 6, 7), num_beams=3, new=1, length_penalty=length_penalty)
    ((event,),) = run(make_engine(ruled.served), [ruled.request(0, search, Prefix())], [0]).values()
    expected = [ids for ids, _ in ruled.by_transformers(search, Prefix())]
    assert [list(answer.token_ids) for answer in event.hypotheses] == expected == [[]] * 3
    assert {(answer.score, answer.finish_reason) for answer in event.hypotheses} == {(0.0, FinishReason.LENGTH)}


def test_what_would_be_wrong_is_seen(some_family, monkeypatch):
    """The controls: each stack of another seed, the soft prompt of another, and beams left where they were."""
    searches = drawn(3, 4, num_beams=4, new=8, length_penalty=1.0, prefix=7, end_bias=3.0, ends=(EOS, 60, 61))
    for index in range(1, len(SETS)):
        right = [some_family.prefix(index, 7)] * len(searches)
        expected = [some_family.by_transformers(search, right[0]) for search in searches]
        assert some_family.disagreements(searches, expected, right) == 0
        assert some_family.disagreements(searches, expected, [some_family.prefix(index, 8)] * len(searches)) > 1, SETS[
            index
        ]
    with monkeypatch.context() as patch:
        patch.setattr(BeamGroup, "_take_copies", lambda self: self._copies.clear() or [])
        assert some_family.disagreements(searches, expected, right) > 1
