"""Rows with beams in a mixed batch find what transformers' `generate` finds for each alone."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from prefix_store.model.frozen import FrozenModel
from server.scheduler.beams import BeamGroup
from server.scheduler.messages import FinishReason, GenerationRequest
from server.scheduler.sampling_params import SamplingParams
from tests.models import EOS, VOCABULARY, random_kv, tiny_frozen, tiny_model
from tests.parity.beams import Search, answers, drawn, hypotheses, run
from tests.parity.harness import make_engine, payload, plain_logits

FAMILIES = ("gpt2", "llama")


@torch.inference_mode()
def by_transformers(model: PreTrainedModel, search: Search, kv: torch.Tensor | None) -> list[tuple[list[int], float]]:
    """Every returned sequence without what ends it or fills it up, and its score."""
    cache, length = None, 0
    ids = torch.tensor([search.prompt])
    if kv is not None:
        length = kv.shape[3]
        cache = DynamicCache()
        for layer in range(kv.shape[0]):
            pair = (part[None].repeat_interleave(search.num_beams, 0) for part in kv[layer])
            cache.update(*pair, layer)
    # `generate` passes over as many tokens as the cache holds; with one of the prompt nothing else is penalised
    padded = torch.cat([ids[:, :1].expand(1, length), ids], 1)
    found = model.generate(padded, attention_mask=torch.ones_like(padded), past_key_values=cache, **search.options())
    return search.answers(found, padded.shape[1])


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request) -> tuple[FrozenModel, PreTrainedModel]:
    return tiny_frozen(request.param), tiny_model(request.param)


def prefixes_of(frozen: FrozenModel, searches: Sequence[Search]) -> dict[int, torch.Tensor]:
    return {length: random_kv(frozen, length, seed=length) for length in {one.prefix for one in searches} if length}


def requests_of(frozen: FrozenModel, searches: Sequence[Search]) -> list[GenerationRequest]:
    payloads = {length: payload(kv, f"p{length}") for length, kv in prefixes_of(frozen, searches).items()}
    return [one.request(str(index), payloads.get(one.prefix)) for index, one in enumerate(searches)]


def ordinary(frozen: FrozenModel, count: int = 6) -> list[GenerationRequest]:
    """Rows without beams, of other prefixes."""
    draw = random.Random(1)
    params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
    return [
        GenerationRequest(
            f"row {index}",
            "t",
            tuple(draw.choices(range(2, VOCABULARY), k=draw.randint(1, 30))),
            params,
            payload(random_kv(frozen, 5 + index, seed=90 + index), f"row {index}") if index % 3 else None,
        )
        for index in range(count)
    ]


def disagreements(
    frozen: FrozenModel,
    plain: PreTrainedModel,
    searches: Sequence[Search],
    changes: Mapping[str, Any] = MappingProxyType({}),
    **limits: int,
) -> int:
    """How many searches, with these changes, find anything else in one engine than each does alone in transformers."""
    requests, kv = requests_of(frozen, [replace(one, **changes) for one in searches]), prefixes_of(frozen, searches)
    events = run(make_engine(frozen, **limits), requests, [one.arrives for one in searches])
    return sum(
        answers(events[made.id]) != [ids for ids, _ in by_transformers(plain, one, kv.get(one.prefix))]
        for made, one in zip(requests, searches, strict=True)
    )


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 6))])
def test_beams_among_rows_of_other_prefixes_find_what_each_finds_alone(pair, seed):
    frozen, plain = pair
    searches = drawn(seed)
    kv, requests, rows = prefixes_of(frozen, searches), requests_of(frozen, searches), ordinary(frozen)
    arrives = [*(one.arrives for one in searches), *range(len(rows))]
    events = run(make_engine(frozen), [*requests, *rows], arrives)
    for made, one in zip(requests, searches, strict=True):
        found, expected = hypotheses(events[made.id]), by_transformers(plain, one, kv.get(one.prefix))
        assert [list(answer.token_ids) for answer in found] == [ids for ids, _ in expected], one
        assert [answer.score for answer in found] == pytest.approx([score for _, score in expected], rel=1e-4)
    without = run(make_engine(frozen), rows, list(range(len(rows))))
    for row in rows:
        assert [event.token_ids for event in events[row.id]] == [event.token_ids for event in without[row.id]]


def test_a_preempted_group_goes_on_as_if_nothing_had_been(pair, monkeypatch):
    frozen, plain = pair
    monkeypatch.setattr("server.scheduler.admission.HEADROOM", 2)
    searches = drawn(5, 6, new=18, least=15, num_beams=4, prefix=3, arrives=0)
    forgotten = []
    forget = BeamGroup.forget
    monkeypatch.setattr(BeamGroup, "forget", lambda self: forgotten.append(len(self.beams)) or forget(self))
    assert disagreements(frozen, plain, searches, slots=300, rows=16, step_tokens=24) == 0
    assert forgotten.count(4) > 3


def test_what_would_be_wrong_is_seen(pair, monkeypatch):
    """The controls: beams left where they were, scores without their length, and the wrong prefix."""
    frozen, plain = pair
    searches = drawn(3, num_beams=4, new=16, length_penalty=1.0, prefix=7, end_bias=3.0, ends=(EOS, 60, 61))
    assert disagreements(frozen, plain, searches) == 0
    with monkeypatch.context() as patch:
        patch.setattr(BeamGroup, "_take_copies", lambda self: self._copies.clear() or [])
        assert disagreements(frozen, plain, searches) > 4
    assert disagreements(frozen, plain, searches, {"length_penalty": 0.0}) > 1
    assert disagreements(frozen, plain, searches, {"prefix": 8}) > 4


def test_an_abort_frees_all_slots_of_a_group_before_the_next_step(pair):
    frozen, _ = pair
    engine = make_engine(frozen)
    engine.scheduler.add(Search((5, 6, 7), 4, 50).request("a", None), seed=0)
    for _ in range(5):
        engine.step()
    assert engine.scheduler.slots.used
    event = engine.scheduler.abort("a", FinishReason.ABORT)
    assert (event.hypotheses, engine.scheduler.slots.used) == ((), 0)
    engine.scheduler.check_integrity()
    assert not engine.scheduler.running


def test_logprobs_are_those_of_the_hypothesis_and_sum_up_to_its_score(pair):
    frozen, plain = pair
    search = Search((5, 6, 7, 8), 4, 12, length_penalty=0.0, ends=(EOS, 60, 61))
    prefix = payload(random_kv(frozen, 7), "p")
    made = search.request("a", prefix, logprobs=2, echo=True)
    ((event,),) = run(make_engine(frozen), [made], [0]).values()
    assert [entry.token_id for entry in event.prompt_logprobs] == [5, 6, 7, 8]
    for found in event.hypotheses:
        ended = [found.end_logprob] if found.end_logprob is not None else []
        assert [entry.token_id for entry in found.logprobs] == list(found.token_ids)
        assert (found.finish_reason is FinishReason.STOP) == bool(ended)
        entries = [*found.logprobs, *ended]
        assert sum(entry.logprob for entry in entries) == pytest.approx(found.score, abs=1e-4)
        logits = plain_logits(plain, [5, 6, 7, 8, *found.token_ids], prefix.tensor).log_softmax(-1)[3:]
        for entry, row in zip(entries, logits, strict=False):
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
            assert [token for token, _ in entry.top] == row.topk(2).indices.tolist()
