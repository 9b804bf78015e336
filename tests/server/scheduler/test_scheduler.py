from __future__ import annotations

import contextlib
import random

import pytest

from prefix_store.errors import ContextLengthExceeded, Overloaded, PrefixNumerics
from server.scheduler.messages import FinishReason, GenerationRequest, PrefixPayload, TokenEvent, TokenLogprob
from server.scheduler.plan import Load, Move, RowResult, StepPlan
from server.scheduler.sampling_params import SamplingParams
from server.scheduler.scheduler import Limits, Scheduler
from server.scheduler.service import GENERATED_WEIGHT

EOS = 1


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make(clock: Clock | None = None, **limits: int) -> Scheduler:
    numbers = {"slots": 200, "rows": 8, "step_tokens": 32, "context_length": 100, "waiting": 50} | limits
    return Scheduler(Limits(**numbers), frozenset({EOS}), clock or Clock())


def request(name: str, prompt: int = 4, new: int = 3, prefix: int = 0, digest: str = "p", **more) -> GenerationRequest:
    payload = PrefixPayload(f"{digest}{prefix}", prefix, prefix, True, None) if prefix else None
    params = SamplingParams(max_tokens=new, **more.pop("params", {}))
    return GenerationRequest(name, "t", tuple(range(10, 10 + prompt)), params, payload, **more)


def run(scheduler: Scheduler, token: int = 7) -> list[TokenEvent]:
    plan = scheduler.schedule()
    results = [RowResult(token if row.samples else None) for row in plan.rows]
    return scheduler.commit(plan, results)


def drain(scheduler: Scheduler) -> list[TokenEvent]:
    events = []
    while scheduler.running or scheduler.waiting:
        events += run(scheduler)
        scheduler.check_integrity()
    return events


def test_a_request_runs_from_prompt_to_length():
    scheduler = make()
    scheduler.add(request("a", prompt=4, new=3), seed=0)
    events = drain(scheduler)
    assert [event.token_ids for event in events] == [(7,), (7,), (7,)]
    assert events[-1].finish_reason is FinishReason.LENGTH
    assert scheduler.slots.used == 0


def test_prompts_run_in_chunks_behind_decoding():
    scheduler = make(step_tokens=8)
    scheduler.add(request("a", prompt=4, new=9), seed=0)
    run(scheduler)
    scheduler.add(request("b", prompt=20, new=2), seed=0)
    shapes = []
    for _ in range(3):
        plan = scheduler.schedule()
        shapes.append([(row.sequence.request.id, row.start, row.count, row.samples) for row in plan.rows])
        scheduler.commit(plan, [RowResult(7 if row.samples else None) for row in plan.rows])
    assert shapes == [
        [("a", 4, 1, True), ("b", 0, 7, False)],
        [("a", 5, 1, True), ("b", 7, 7, False)],
        [("a", 6, 1, True), ("b", 14, 6, True)],
    ]


def test_eos_and_stop_tokens_end_a_row_and_are_not_given_out():
    scheduler = make()
    for name, params in [("eos", {}), ("stop", {"stop_token_ids": frozenset({EOS})})]:
        scheduler.add(request(name, params=params), seed=0)
    for event in run(scheduler, token=EOS):
        assert (event.token_ids, event.finish_reason) == ((), FinishReason.STOP)
    scheduler.add(request("on", params={"ignore_eos": True}), seed=0)
    assert run(scheduler, token=EOS)[0].token_ids == (EOS,)


def test_the_logprob_of_the_token_that_ends_a_row_comes_beside_the_others():
    scheduler = make()
    ended, going_on = TokenLogprob(EOS, -0.5), TokenLogprob(7, -0.25)
    for name, logprob in (("a", ended), ("b", going_on)):
        scheduler.add(request(name, params={"logprobs": 0}), seed=0)
        (event,) = scheduler.commit(scheduler.schedule(), [RowResult(logprob.token_id, logprob)])
        found = ((), ended) if name == "a" else ((going_on,), None)
        assert (event.logprobs, event.end_logprob) == found


def test_one_prefix_is_loaded_once_for_all_its_readers():
    scheduler = make()
    for name in "abc":
        scheduler.add(request(name, prefix=20), seed=0)
    plan = scheduler.schedule()
    assert [type(t) for t in plan.transfers] == [Load]
    assert len({row.sequence.resident.extent for row in plan.rows}) == 1


def test_a_prefix_in_use_is_never_evicted_and_an_idle_one_is():
    scheduler = make(slots=60)
    scheduler.add(request("a", prompt=4, new=30, prefix=20, digest="used"), seed=0)
    run(scheduler)
    scheduler.add(request("b", prompt=4, new=3, prefix=38, digest="next"), seed=0)
    run(scheduler)
    assert len(scheduler.running) == 1
    assert scheduler.residency.evictions == 0
    drain(scheduler)
    assert scheduler.residency.evictions == 1


def test_idle_prefixes_are_not_evicted_when_that_would_not_help():
    scheduler = make(slots=60)
    scheduler.add(request("idle", prompt=2, new=1, prefix=10, digest="idle"), seed=0)
    drain(scheduler)
    scheduler.add(request("a", prompt=4, new=20), seed=0)
    run(scheduler)
    scheduler.add(request("b", prompt=45, new=2), seed=0)
    run(scheduler)
    assert len(scheduler.residency) == 1
    drain(scheduler)


def test_a_request_is_one_hit_or_one_miss_however_long_it_waits():
    scheduler = make(slots=60)
    for name in "abc":
        scheduler.add(request(name, prompt=10, new=10, prefix=20), seed=0)
    drain(scheduler)
    assert (scheduler.residency.hits, scheduler.residency.misses) == (2, 1)


def test_growth_moves_a_row_that_cannot_grow_in_place(monkeypatch):
    monkeypatch.setattr("server.scheduler.admission.HEADROOM", 1)
    scheduler = make(slots=100)
    scheduler.add(request("a", prompt=4, new=20), seed=0)
    scheduler.add(request("b", prompt=4, new=20), seed=0)
    moves = []
    while scheduler.running or scheduler.waiting:
        plan = scheduler.schedule()
        moves += [transfer for transfer in plan.transfers if isinstance(transfer, Move)]
        scheduler.commit(plan, [RowResult(7 if row.samples else None) for row in plan.rows])
        scheduler.check_integrity()
    assert moves
    assert all(move.size <= move.source.size < move.target.size for move in moves)


def test_the_newest_row_is_preempted_and_still_gives_every_token(monkeypatch):
    monkeypatch.setattr("server.scheduler.admission.HEADROOM", 1)
    scheduler = make(slots=40)
    for name in "abc":
        scheduler.add(request(name, prompt=4, new=20), seed=0)
    events = drain(scheduler)
    assert scheduler.admission.preemptions > 0
    for name in "abc":
        assert sum(len(event.token_ids) for event in events if event.request_id == name) == 20


def test_a_lone_request_fits_however_idle_prefixes_lie():
    scheduler = make(slots=60)
    scheduler.add(request("a", prompt=2, new=30, prefix=9, digest="left"), seed=0)
    scheduler.add(request("b", prompt=2, new=2, prefix=3, digest="middle"), seed=0)
    drain(scheduler)
    scheduler.add(request("c", prompt=40, new=10, prefix=3, digest="middle"), seed=0)
    assert drain(scheduler)[-1].finish_reason is FinishReason.LENGTH


def test_what_can_never_run_is_refused_and_what_is_refused_is_forgotten():
    scheduler = make(waiting=1)
    with pytest.raises(ContextLengthExceeded):
        scheduler.add(request("a", prompt=100, new=10, prefix=20), seed=0)
    scheduler.add(request("a", prompt=70, new=10, prefix=20), seed=0)
    with pytest.raises(KeyError, match="a is in flight already"):
        scheduler.add(request("a"), seed=0)
    with pytest.raises(Overloaded):
        scheduler.add(request("b"), seed=0)
    assert scheduler.abort("b", FinishReason.ABORT) is None
    scheduler.check_integrity()


def test_a_full_queue_says_so_and_when_to_come_back():
    clock = Clock()
    scheduler = make(clock, waiting=2)
    for name in "abc":
        with contextlib.suppress(Overloaded):
            scheduler.add(request(name), seed=0)
    with pytest.raises(Overloaded, match="2 requests are waiting") as full:
        scheduler.add(request("c"), seed=0)
    assert full.value.retry_after == 1
    scheduler.abort("a", FinishReason.ABORT)
    scheduler.add(request("a"), seed=0)
    clock.now = 9.0
    with pytest.raises(Overloaded) as full:
        scheduler.add(request("c"), seed=0)
    assert full.value.retry_after == 9


def test_abort_and_deadline_free_slots_at_once():
    clock = Clock()
    scheduler = make(clock, rows=2)
    for name, deadline in [("a", None), ("b", 5.0), ("c", 5.0)]:
        scheduler.add(request(name, new=50, deadline=deadline), seed=0)
    run(scheduler)
    assert scheduler.expire() == []
    assert scheduler.abort("a", FinishReason.ABORT) == TokenEvent("a", finish_reason=FinishReason.ABORT)
    assert scheduler.abort("a", FinishReason.ABORT) is None
    clock.now = 5.0
    assert {event.request_id for event in scheduler.expire()} == {"b", "c"}
    assert scheduler.slots.used == 0


def test_a_failed_row_ends_alone():
    scheduler = make()
    scheduler.add(request("a"), seed=0)
    scheduler.add(request("b"), seed=0)
    plan = scheduler.schedule()
    overflow = PrefixNumerics()
    events = scheduler.commit(plan, [RowResult(error=overflow), RowResult(7)])
    assert [(e.request_id, e.finish_reason, e.error) for e in events] == [
        ("a", FinishReason.ERROR, overflow),
        ("b", None, None),
    ]
    scheduler.check_integrity()


def replay(plan: StepPlan, memory: dict[int, object]) -> None:
    """Brute force: does in a dictionary what the device does in the pool, and checks what every row would read."""
    for transfer in plan.transfers:
        if isinstance(transfer, Load):
            memory |= {transfer.extent.start + i: (transfer.payload.digest, i) for i in range(transfer.extent.size)}
        else:
            copied = [memory[transfer.source.start + i] for i in range(transfer.size)]
            memory |= {transfer.target.start + i: cell for i, cell in enumerate(copied)}
    for row in plan.rows:
        start = row.sequence.extent.start
        for index in range(row.start, row.start + row.count):
            memory[start + index] = (row.sequence.request.id, index)
    for row in plan.rows:
        sequence = row.sequence
        for index in range(row.start + row.count):
            assert memory[sequence.extent.start + index] == (sequence.request.id, index)
        if sequence.resident is not None:
            payload, extent = sequence.resident.payload, sequence.resident.extent
            assert payload is sequence.request.prefix
            assert [memory[extent.start + i] for i in range(extent.size)] == [
                (payload.digest, i) for i in range(payload.slots)
            ]


@pytest.mark.parametrize("seed", range(60))
def test_every_row_reads_its_own_slots_under_random_traffic(seed, monkeypatch):
    draw = random.Random(seed)
    monkeypatch.setattr("server.scheduler.admission.HEADROOM", draw.choice([1, 4, 64]))
    scheduler = make(
        slots=draw.randint(100, 160), rows=draw.randint(1, 8), step_tokens=draw.randint(9, 40), waiting=500
    )
    memory: dict[int, object] = {}
    wanted: dict[str, int] = {}
    got: dict[str, int] = {}
    prefixes = [PrefixPayload(f"d{i}", n, n, True, None) for i, n in enumerate([1, 3, 10, 20, 33])]
    prefixes += [PrefixPayload(f"m{n}", 0, 0, True, None, feature_map="elu", memory_slots=n) for n in (7, 30)]
    tenants = "tuvw"[: 1 + 3 * (seed % 2)]
    for step in range(4000):
        if step < 120 and draw.random() < 0.4:
            name, new = f"r{step}", draw.randint(1, 25)
            params = SamplingParams(max_tokens=new)
            prompt = tuple(range(draw.randint(1, 40)))
            scheduler.add(
                GenerationRequest(name, draw.choice(tenants), prompt, params, draw.choice([None, *prefixes])), seed=0
            )
            wanted[name] = new
        if wanted and draw.random() < 0.05:
            name = draw.choice(list(wanted))
            if scheduler.abort(name, FinishReason.ABORT):
                wanted.pop(name)
                got.pop(name, None)
        plan = scheduler.schedule()
        assert sum(row.count for row in plan.rows) <= max(scheduler.limits.step_tokens, len(scheduler.running))
        replay(plan, memory)
        for event in scheduler.commit(plan, [RowResult(7 if row.samples else None) for row in plan.rows]):
            got[event.request_id] = got.get(event.request_id, 0) + len(event.token_ids)
        scheduler.check_integrity()
        if step >= 120 and not scheduler.running and not scheduler.waiting:
            break
    assert got == wanted


def read(scheduler: Scheduler) -> list[tuple[str, int]]:
    """Which sources one step reads, and how many tokens it takes."""
    plan = scheduler.schedule()
    scheduler.commit(plan, [RowResult(7 if row.samples else None) for row in plan.rows])
    scheduler.check_integrity()
    return [(row.sequence.request.id, row.sequence.source_length) for row in plan.rows if row.start == 0]


def test_sources_are_read_whole_as_many_as_a_step_has_room_for():
    scheduler = make(step_tokens=20, slots=400)
    for name, length in (("a", 8), ("b", 9), ("c", 8), ("d", 50), ("e", 2)):
        scheduler.add(request(name, prompt=1, new=9, source_ids=(5,) * length), seed=0)
    # a token of the answer comes with each; one source that is longer than a step is read beside rows that decode
    assert read(scheduler) == [("a", 8), ("b", 9)]
    assert read(scheduler) == [("c", 8)]
    assert read(scheduler) == [("d", 50)]
    assert read(scheduler) == [("e", 2)]
    assert read(scheduler) == []
    drain(scheduler)
    assert scheduler.slots.used == 0


def test_a_source_is_charged_once_as_a_prompt_is():
    scheduler = make()
    scheduler.add(request("a", prompt=1, new=2, source_ids=(5,) * 12), seed=0)
    plan = scheduler.schedule()
    (row,) = plan.rows
    assert (row.count, row.cost, scheduler.service.owed(row.sequence)) == (1, 13, 13)
    scheduler.commit(plan, [RowResult(7)])
    assert scheduler.service.received("t") == 13 + GENERATED_WEIGHT
    assert scheduler.service.owed(row.sequence) == 0
    scheduler.admission.preempt(row.sequence)
    assert row.sequence.is_unread
    scheduler.check_integrity()
    (row,) = scheduler.schedule().rows
    assert (row.count, row.cost, row.encodes) == (2, 14, True)  # it is read again, with what was answered so far


def test_an_answer_cut_short_ends_with_the_models_own_end_which_nobody_sees():
    scheduler = make()
    scheduler.add(request("a", new=3, last_id=EOS), seed=0)
    events = [*run(scheduler), *run(scheduler), *run(scheduler, token=EOS)]
    assert [event.token_ids for event in events] == [(7,), (7,), ()]
    assert events[-1].finish_reason is FinishReason.LENGTH
