"""Beam search without a model: every text has made-up log-probabilities, and slots hold the text they were made for."""

from __future__ import annotations

import contextlib
import math
import random
from dataclasses import dataclass

import pytest

from prefix_store.errors import InvalidRequest, PrefixNumerics
from server.scheduler.beams import BeamGroup
from server.scheduler.limits import Limits
from server.scheduler.messages import FinishReason, GenerationRequest, Hypothesis, PrefixPayload, TokenEvent
from server.scheduler.plan import Candidate, Load, Move, Row, RowResult, StepPlan
from server.scheduler.sampling_params import SamplingParams
from server.scheduler.scheduler import Scheduler
from tests.server.scheduler.traffic import EOS

VOCABULARY = 12
HIDDEN = PrefixPayload("hidden", 6, 6, True, None)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def logprobs(tokens: tuple[int, ...], digest: str | None) -> list[float]:
    """Of every token behind a text: a function of the whole of it and of the prefix."""
    draw = random.Random(f"{digest} {tokens}")
    logits = [draw.gauss(0, 2) for _ in range(VOCABULARY)]
    total = math.log(sum(math.exp(logit) for logit in logits))
    return [logit - total for logit in logits]


def plainly(made: GenerationRequest) -> list[tuple[tuple[int, ...], float]]:
    """The same search over all texts of a step, by transformers' rules: answers without their end, and their scores."""
    params, digest = made.params, made.prefix.digest if made.prefix else None
    # of an encoder-decoder model's prompt transformers gives only the start, and finds the rest itself
    found = len(made.prompt_ids) - 1 if made.source_ids else 0
    live: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    ended: list[tuple[float, tuple[int, ...]]] = []
    for length in range(1, params.max_tokens + 1):
        texts = [
            (score + each, (*text, token))
            for score, text in live
            for token, each in enumerate(logprobs((*made.prompt_ids, *text), digest))
            if each > -math.inf
        ]
        texts.sort(key=lambda one: -one[0])
        last = length == params.max_tokens
        for score, text in texts[: params.num_beams]:
            if last or text[-1] == EOS:
                ended.append((score / (found + length) ** params.length_penalty, text))
        ended = sorted(ended, key=lambda one: -one[0])[: params.num_beams]
        live = [one for one in texts if one[1][-1] != EOS][: params.num_beams]
        if not live:
            break
        if len(ended) == params.num_beams:
            if params.early_stopping is True:
                break
            never = params.early_stopping == "never" and params.length_penalty > 0
            reach = params.max_tokens if never else length
            if live[0][0] / (found + reach) ** params.length_penalty <= ended[-1][0]:
                break
    return [(text[:-1] if text[-1] == EOS else text, score) for score, text in ended]


def request(name: str, prompt: int = 4, new: int = 6, beams: int = 3, tenant: str = "t", **more) -> GenerationRequest:
    chosen = {key: more.pop(key) for key in ("length_penalty", "early_stopping") if key in more}
    params = SamplingParams(max_tokens=new, num_beams=beams, **chosen)
    return GenerationRequest(name, tenant, tuple(range(20, 20 + prompt)), params, **more)


def make(clock: Clock | None = None, **limits: int) -> Scheduler:
    numbers = {"slots": 400, "rows": 8, "step_tokens": 32, "context_length": 100, "waiting": 500} | limits
    return Scheduler(Limits(**numbers), frozenset({EOS}), clock or Clock())


@dataclass
class Device:
    """Does with texts what the pool does with keys and values."""

    scheduler: Scheduler

    def __post_init__(self) -> None:
        self.slots: dict[int, object] = {}

    def step(self) -> list[TokenEvent]:
        plan = self.scheduler.schedule()
        events = self.scheduler.commit(plan, self.run(plan))
        self.scheduler.check_integrity()
        return events

    def run(self, plan: StepPlan) -> list[RowResult]:
        assert sum(row.count for row in plan.rows) <= self.scheduler.limits.step_tokens
        for transfer in plan.transfers:
            if isinstance(transfer, Load):
                extent = transfer.extent
                self.slots |= {extent.start + i: (transfer.payload.digest, i) for i in range(extent.size)}
            else:
                self._move(transfer)
        for row in plan.rows:
            tokens, start = row.sequence.tokens, row.sequence.extent.start
            assert row.start + row.count <= row.sequence.extent.size
            self.slots |= {start + i: tuple(tokens[: i + 1]) for i in range(row.start, row.start + row.count)}
        return [self._result(row) for row in plan.rows]

    def drain(self, most: int = 4000) -> dict[str, list[TokenEvent]]:
        events: dict[str, list[TokenEvent]] = {}
        for _ in range(most):
            if not self.scheduler.running and not self.scheduler.waiting:
                return events
            for event in self.step():
                events.setdefault(event.request_id, []).append(event)
        raise AssertionError("somebody is never served")

    def _move(self, move: Move) -> None:
        copied = [self.slots.get(move.source.start + i) for i in range(move.size)]
        self.slots |= {move.target.start + i: cell for i, cell in enumerate(copied)}

    def _result(self, row: Row) -> RowResult:
        sequence, end = row.sequence, row.start + row.count
        for index in range(end):
            assert self.slots[sequence.extent.start + index] == tuple(sequence.tokens[: index + 1])
        digest = None
        if sequence.request.prefix is not None:
            extent, digest = sequence.resident.extent, sequence.request.prefix.digest
            assert [self.slots[slot] for slot in range(extent.start, extent.end)] == [
                (digest, i) for i in range(extent.size)
            ]
        if not row.samples:
            return RowResult()
        if sequence.width == 1:
            return RowResult(7)
        found = logprobs(tuple(sequence.tokens), digest)
        if sequence.forced is not None:
            found = [0.0 if token == sequence.forced else -math.inf for token in range(VOCABULARY)]
        best = sorted(range(VOCABULARY), key=lambda token: -found[token])[: sequence.width + 1]
        return RowResult(candidates=tuple(Candidate(token, found[token]) for token in best))


def said(found: tuple[Hypothesis, ...]) -> list[tuple[tuple[int, ...], float]]:
    return [(answer.token_ids, pytest.approx(answer.score)) for answer in found]


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -2.0, 2.0])
def test_a_group_alone_finds_what_a_plain_search_finds(length_penalty, early_stopping):
    for beams in (2, 3, 5):
        for prompt in (1, 5):
            made = request("a", prompt, 8, beams, length_penalty=length_penalty, early_stopping=early_stopping)
            device = Device(make())
            device.scheduler.add(made, seed=0)
            ((event,),) = device.drain().values()
            assert plainly(made) == said(event.hypotheses)
            assert event.finish_reason is event.hypotheses[0].finish_reason


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, -2.0, 2.0])
def test_a_beginning_that_the_models_rules_force_counts_in_an_answers_length(length_penalty, early_stopping):
    for prompt in (1, 2, 4):
        chosen = {"length_penalty": length_penalty, "early_stopping": early_stopping}
        made = request("a", prompt, 8, 4, source_ids=(30, 31, 32), **chosen)
        device = Device(make())
        device.scheduler.add(made, seed=0)
        ((event,),) = device.drain().values()
        assert plainly(made) == said(event.hypotheses)


def allow(monkeypatch: pytest.MonkeyPatch, *possible: int) -> None:
    """No other token may come next."""
    every = logprobs

    def some(tokens: tuple[int, ...], digest: str | None) -> list[float]:
        return [each if token in possible else -math.inf for token, each in enumerate(every(tokens, digest))]

    monkeypatch.setitem(globals(), "logprobs", some)


@pytest.mark.parametrize("possible", [(5,), (EOS, 5), (5, 6), (EOS, 5, 6)])
@pytest.mark.parametrize("new", [1, 2, 7])
def test_no_answer_has_a_token_that_cannot_come(possible, new, monkeypatch):
    """Fewer beams than were asked for go on; where there are fewer answers, the best stands for those that lack."""
    allow(monkeypatch, *possible)
    for name, beams in (("a", 4), ("b", 8)):
        made, device = request(name, new=new, beams=beams), Device(make())
        device.scheduler.add(made, seed=0)
        ((event,),) = device.drain().values()
        found = plainly(made)
        assert said(event.hypotheses) == found + found[:1] * (beams - len(found))


def test_a_search_in_which_nothing_can_come_fails_alone(monkeypatch):
    allow(monkeypatch)
    device = Device(make())
    for name, beams in (("a", 3), ("b", 1)):
        device.scheduler.add(request(name, beams=beams), seed=0)
    events = device.drain()
    assert [event.finish_reason for event in events["a"]] == [FinishReason.ERROR]
    assert "no token may come next" in str(events["a"][0].error)
    assert events["b"][-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("last_id", [EOS, 5])
def test_where_only_the_forced_end_has_room_there_is_one_answer(last_id):
    device = Device(make())
    device.scheduler.add(request("a", new=1, beams=3, last_id=last_id), seed=0)
    ((event,),) = device.drain().values()
    assert [(found.token_ids, found.score, found.finish_reason) for found in event.hypotheses] == [
        ((), 0.0, FinishReason.LENGTH)
    ] * 3


@pytest.mark.parametrize("seed", range(40))
def test_groups_find_the_same_under_random_traffic(seed, monkeypatch):
    draw = random.Random(seed)
    monkeypatch.setattr("server.scheduler.admission.HEADROOM", draw.choice([1, 4, 64]))
    clock = Clock()
    rows = draw.randint(3, 9)
    device = Device(make(clock, slots=draw.randint(130, 300), rows=rows, step_tokens=draw.randint(rows, 40)))
    scheduler = device.scheduler
    prefixes = [None, HIDDEN, PrefixPayload("long", 30, 30, True, None)]
    wanted: dict[str, GenerationRequest] = {}
    events: dict[str, list[TokenEvent]] = {}
    for step in range(4000):
        clock.now += 1.0
        if step < 80 and draw.random() < 0.4:
            made = request(
                f"r{step}",
                draw.randint(1, 20),
                draw.randint(1, 14),
                draw.choice([1, 1, 2, 3, rows]),
                draw.choice("tuv"),
                prefix=draw.choice(prefixes),
                deadline=clock.now + draw.randint(1, 30) if draw.random() < 0.1 else None,
            )
            with contextlib.suppress(InvalidRequest):
                scheduler.add(made, seed=0)
                wanted[made.id] = made
        if wanted and draw.random() < 0.05 and (name := draw.choice(list(wanted))):
            held = scheduler.slots.used
            if scheduler.abort(name, FinishReason.ABORT):
                assert scheduler.slots.used <= held
                del wanted[name]
        if step % 17 == 3:
            scheduler.space.preload(HIDDEN, "h") if draw.random() < 0.5 else scheduler.space.release("hidden", "h")
        for event in [*scheduler.expire(), *device.step()]:
            events.setdefault(event.request_id, []).append(event)
        if step >= 80 and not scheduler.running and not scheduler.waiting:
            break
    assert {name for name, found in events.items() if found[-1].finish_reason} >= set(wanted)
    for name, made in wanted.items():
        if events[name][-1].finish_reason is FinishReason.TIMEOUT:
            continue
        if made.params.num_beams == 1:
            assert sum(len(event.token_ids) for event in events[name]) == made.params.max_tokens
        else:
            (event,) = events[name]
            assert plainly(made) == said(event.hypotheses), made


def test_the_traffic_preempts_groups_at_every_stage(monkeypatch):
    """Or the test above shows nothing: some that have just begun, some in mid-search, some while computed again."""
    stages: set[str] = set()
    forget = BeamGroup.forget

    def noted(group: BeamGroup) -> None:
        computed = {beam.remaining for beam in group.beams} == {1}
        stages.add("prompt" if len(group.beams) == 1 else "search" if computed else "again")
        forget(group)

    monkeypatch.setattr(BeamGroup, "forget", noted)
    for seed in range(40):
        with monkeypatch.context() as patch:
            test_groups_find_the_same_under_random_traffic(seed, patch)
    assert stages == {"prompt", "search", "again"}


def test_slots_that_do_not_follow_their_beam_are_seen(monkeypatch):
    monkeypatch.setattr(BeamGroup, "_take_copies", lambda group: [])
    device = Device(make())
    device.scheduler.add(request("a", new=8, beams=4), seed=0)
    with pytest.raises((AssertionError, KeyError)):
        device.drain()


def test_an_end_that_is_forced_for_want_of_room_is_no_stop():
    device = Device(make())
    made = request("a", new=3, beams=2, last_id=EOS, length_penalty=0.0)
    device.scheduler.add(made, seed=0)
    ((event,),) = device.drain().values()
    lengths = {len(answer.token_ids): answer.finish_reason for answer in event.hypotheses}
    assert lengths[2] is FinishReason.LENGTH
    assert all(reason is FinishReason.STOP for length, reason in lengths.items() if length < 2)
    for answer in event.hypotheses:
        told = [logprobs((*made.prompt_ids, *answer.token_ids[:end]), None) for end in range(len(answer.token_ids))]
        own = sum(row[token] for row, token in zip(told, answer.token_ids, strict=True))
        if answer.finish_reason is FinishReason.LENGTH:
            assert answer.score == pytest.approx(own)  # a token that has no choice costs nothing


def test_a_prompt_is_computed_once_for_all_beams():
    device = Device(make())
    device.scheduler.add(request("a", prompt=20, new=3, beams=4), seed=0)
    plan = device.scheduler.schedule()
    assert [(row.start, row.count) for row in plan.rows] == [(0, 20)]
    device.scheduler.commit(plan, device.run(plan))
    plan = device.scheduler.schedule()
    assert [(row.start, row.count) for row in plan.rows] == [(20, 1)] * 4
    assert [move.size for move in plan.transfers] == [20] * 3


def test_only_the_slots_that_differ_are_copied():
    device = Device(make())
    made = request("a", prompt=20, new=12, beams=4)
    device.scheduler.add(made, seed=0)
    sizes = []
    while device.scheduler.running or device.scheduler.waiting:
        plan = device.scheduler.schedule()
        sizes.append([move.size for move in plan.transfers])
        device.scheduler.commit(plan, device.run(plan))
    assert sizes[1] == [20] * 3
    later = [size for step in sizes[2:] for size in step]
    assert later
    assert max(later) < 12


def test_a_group_takes_as_many_rows_as_it_has_beams():
    device = Device(make(rows=5))
    for name in "ab":
        device.scheduler.add(request(name, beams=3), seed=0)
    device.scheduler.add(request("c", beams=2), seed=0)
    device.step()
    assert [sequence.request.id for sequence in device.scheduler.running] == ["a"]
    device.drain()


def test_tenants_share_by_rows_and_a_group_is_taken_whole():
    scheduler = make(rows=4)
    device = Device(scheduler)
    for name in "ab":
        scheduler.add(request(name, new=20, beams=2, tenant="many"), seed=0)
    device.step()
    scheduler.add(request("c", new=20, beams=1, tenant="other"), seed=0)
    device.step()
    assert [sequence.request.id for sequence in scheduler.running] == ["a", "c"]
    assert scheduler.admission.preemptions == 1
    charged = scheduler.service.received("many"), scheduler.service.received("other")
    device.step()
    assert scheduler.service.received("many") - charged[0] == 4
    assert scheduler.service.received("other") - charged[1] == 2


def test_what_can_never_run_is_refused_by_name():
    scheduler = make(rows=8, step_tokens=4, slots=120)
    for made, message in (
        (request("a", beams=5), "num_beams must be at most 4 on this server, got 5"),
        (request("a", prompt=30, new=10, beams=3), r"3 beams of 40 tokens need 120 KV slots, this server has 110"),
    ):
        with pytest.raises(InvalidRequest, match=message) as refused:
            scheduler.add(made, seed=0)
        assert refused.value.param == "num_beams"
    device = Device(scheduler)
    for digest, length in (("a", 5), ("b", 5)):
        scheduler.space.preload(PrefixPayload(digest, length, length, True, None), "holder")
    scheduler.add(request("a", prompt=26, new=10, beams=3), seed=0)
    assert len(device.drain()["a"][0].hypotheses) == 3


def test_a_group_that_runs_out_of_time_gives_the_best_so_far():
    clock = Clock()
    device = Device(make(clock))
    device.scheduler.add(request("a", new=20, beams=3, deadline=4.0), seed=0)
    device.scheduler.add(request("b", prompt=40, new=20, beams=3, deadline=4.0), seed=0)
    while clock.now < 3:
        clock.now += 1
        device.step()
    clock.now = 4.0
    first, second = device.scheduler.expire()
    assert {found.finish_reason for found in first.hypotheses} <= {FinishReason.TIMEOUT, FinishReason.STOP}
    assert len(first.hypotheses) == 3
    scores = [found.score for found in first.hypotheses]
    assert scores == sorted(scores, reverse=True)
    assert first.hypotheses[0].token_ids
    assert (second.finish_reason, len(second.hypotheses)) == (FinishReason.TIMEOUT, 3)
    assert device.scheduler.slots.used == 0


def test_a_group_fails_as_a_whole():
    device = Device(make())
    device.scheduler.add(request("a"), seed=0)
    device.scheduler.add(request("b"), seed=0)
    device.step()
    plan = device.scheduler.schedule()
    results = device.run(plan)
    overflow = PrefixNumerics()
    results[1] = RowResult(error=overflow)
    (event,) = device.scheduler.commit(plan, results)
    assert (event.request_id, event.finish_reason, event.error) == ("a", FinishReason.ERROR, overflow)
    device.scheduler.check_integrity()
    assert list(device.drain()) == ["b"]
