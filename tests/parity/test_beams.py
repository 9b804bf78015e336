"""Rows with beams in a mixed batch find what transformers' `generate` finds for each alone."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from prefix_store.model.frozen import FrozenModel
from server.engine.engine import Engine
from server.scheduler.beams import BeamGroup
from server.scheduler.messages import FinishReason, GenerationRequest, Hypothesis, PrefixPayload, TokenEvent
from server.scheduler.sampling_params import SamplingParams
from tests.models import EOS, VOCABULARY, random_kv, tiny_frozen, tiny_model
from tests.parity.harness import make_engine, payload, plain_logits

FAMILIES = ("gpt2", "llama")


@dataclass(frozen=True)
class Search:
    """A beam search as transformers takes it, and when it arrives."""

    prompt: tuple[int, ...]
    num_beams: int
    new: int
    least: int = 0
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    repetition_penalty: float = 1.0
    end_bias: float = 0.0
    ends: tuple[int, ...] = (EOS,)
    prefix: int = 0
    arrives: int = 0

    def request(self, name: str, prefix: PrefixPayload | None, **more) -> GenerationRequest:
        params = SamplingParams(
            max_tokens=self.new,
            min_tokens=self.least,
            num_beams=self.num_beams,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            repetition_penalty=self.repetition_penalty,
            logit_bias=tuple((end, self.end_bias) for end in self.ends) if self.end_bias else (),
            stop_token_ids=frozenset(self.ends),
            ignore_eos=True,
            **more,
        )
        return GenerationRequest(name, "t", self.prompt, params, prefix)


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
    options = {"sequence_bias": [[[end], search.end_bias] for end in search.ends]} if search.end_bias else {}
    if search.repetition_penalty != 1:
        options["repetition_penalty"] = search.repetition_penalty
    found = model.generate(
        padded,
        attention_mask=torch.ones_like(padded),
        past_key_values=cache,
        num_beams=search.num_beams,
        num_return_sequences=search.num_beams,
        do_sample=False,
        max_new_tokens=search.new,
        min_new_tokens=search.least or None,
        length_penalty=search.length_penalty,
        early_stopping=search.early_stopping,
        eos_token_id=list(search.ends) or None,
        pad_token_id=VOCABULARY - 1,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    answers = []
    for row, indices in zip(found.sequences[:, padded.shape[1] :].tolist(), found.beam_indices.tolist(), strict=True):
        size = sum(index >= 0 for index in indices)
        kept = row[:size]
        answers.append(kept[:-1] if kept and kept[-1] in search.ends else kept)
    return list(zip(answers, found.sequences_scores.tolist(), strict=True))


def run(engine: Engine, requests: list[GenerationRequest], arrives: list[int]) -> dict[str, list[TokenEvent]]:
    """Each request's events; integrity holds after every step."""
    pending = sorted(zip(arrives, range(len(requests)), strict=True))
    events: dict[str, list[TokenEvent]] = {made.id: [] for made in requests}
    step = 0
    while pending or engine.scheduler.running or engine.scheduler.waiting:
        while pending and pending[0][0] <= step:
            engine.scheduler.add(requests[pending.pop(0)[1]], seed=0)
        for event in engine.step():
            events[event.request_id].append(event)
        engine.scheduler.check_integrity()
        step += 1
    return events


def hypotheses(events: list[TokenEvent]) -> tuple[Hypothesis, ...]:
    (event,) = events
    assert event.finish_reason in (FinishReason.STOP, FinishReason.LENGTH), event
    return event.hypotheses


def draw_search(draw: random.Random, **fixed) -> Search:
    new = draw.randint(1, 20)
    drawn = {
        "prompt": tuple(draw.choices(range(2, VOCABULARY - 1), k=draw.randint(1, 24))),
        "num_beams": draw.randint(2, 6),
        "new": new,
        "least": draw.choice([0, 0, draw.randint(0, new)]),
        "length_penalty": draw.choice([1.0, 1.0, 0.0, 2.0, -1.0, 0.6]),
        "early_stopping": draw.choice([False, True, "never"]),
        "repetition_penalty": draw.choice([1.0, 1.0, 1.3]),
        "end_bias": draw.choice([0.0, 2.0, 4.0]),
        "ends": draw.choice([(EOS,), (EOS, 60, 61), ()]),
        "prefix": draw.choice([0, 0, 1, 7, 20]),
        "arrives": draw.randint(0, 12),
    }
    if not drawn["ends"]:
        drawn["end_bias"], drawn["least"] = 0.0, 0
    return Search(**{**drawn, **fixed})


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request) -> tuple[FrozenModel, PreTrainedModel]:
    return tiny_frozen(request.param), tiny_model(request.param)


def drawn(seed: int, count: int = 8, **fixed) -> list[Search]:
    draw = random.Random(seed)
    return [draw_search(draw, **fixed) for _ in range(count)]


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


def answers(events: list[TokenEvent]) -> list[list[int]]:
    return [list(found.token_ids) for found in hypotheses(events)]


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
    monkeypatch.setattr("server.scheduler.scheduler.HEADROOM", 2)
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
