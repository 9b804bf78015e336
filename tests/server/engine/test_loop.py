from __future__ import annotations

import queue
import time
from dataclasses import replace

import pytest
import torch

from prefix_store.errors import ContextLengthExceeded, GenerationFailed, OutOfMemory, Overloaded, PrefixNumerics
from server.engine.engine import Engine
from server.engine.kv_pool import bytes_per_slot
from server.engine.loop import EngineLoop
from server.engine.sampled import Sampled
from server.scheduler.messages import FinishReason, GenerationRequest, PrefixPayload, TokenEvent
from server.scheduler.sampling_params import SamplingParams
from server.scheduler.scheduler import Limits
from tests.models import random_kv, tiny_frozen
from tests.server import loops

LIMITS = Limits(slots=1024, rows=4, step_tokens=32, context_length=200, waiting=6)


@pytest.fixture(scope="module", params=[False, True], ids=["step by step", "ahead"])
def engine(request: pytest.FixtureRequest) -> Engine:
    engine = Engine(tiny_frozen("llama"), LIMITS)
    engine.runs_ahead = request.param
    return engine


@pytest.fixture
def loop(engine):
    loop = loops.running(engine)
    yield loop
    loop.stop()
    engine.scheduler.check_integrity()
    assert engine.scheduler.slots.used == sum(r.extent.size for r in engine.scheduler.residency.residents())


def request(name: str, new: int = 5, prefix: PrefixPayload | None = None, **params) -> GenerationRequest:
    chosen = SamplingParams(**{"max_tokens": new, "temperature": 0.0, "ignore_eos": True, **params})
    return GenerationRequest(name, "t", (5, 6, 7), chosen, prefix)


def collect(events: queue.Queue[TokenEvent]) -> tuple[list[int], TokenEvent]:
    tokens: list[int] = []
    while True:
        event = events.get(timeout=20)
        tokens.extend(event.token_ids)
        if event.finish_reason is not None:
            return tokens, event


def submit(loop: EngineLoop, made: GenerationRequest) -> queue.Queue[TokenEvent]:
    events: queue.Queue[TokenEvent] = queue.Queue()
    loop.submit(made, events.put)
    return events


def test_requests_run_to_their_end_and_are_counted(loop):
    streams = [submit(loop, request(f"r{i}")) for i in range(6)]
    results = [collect(stream) for stream in streams]
    assert {tuple(tokens) for tokens, _ in results} == {tuple(results[0][0])}
    assert all(event.finish_reason is FinishReason.LENGTH for _, event in results)
    stats = loop.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.generated_tokens == 30
    assert stats.prompt_tokens == 18


def test_abort_ends_a_running_and_a_waiting_request(loop):
    streams = {name: submit(loop, request(name, new=150)) for name in "abcdef"}
    for name in "abcdef":
        loop.abort(name)
        loop.abort(name)
    loop.abort("never heard of")
    assert {collect(stream)[1].finish_reason for stream in streams.values()} == {FinishReason.ABORT}


def test_what_cannot_run_is_refused_at_once(loop):
    with pytest.raises(ContextLengthExceeded):
        submit(loop, request("long", new=200))


def test_a_full_queue_refuses(engine):
    idle = EngineLoop(engine)  # not started: nothing is taken off the queue
    for index in range(6):
        submit(idle, request(f"{index}"))
    with pytest.raises(Overloaded):
        submit(idle, request("one more"))
    idle.stop()


def test_a_deadline_ends_a_request(loop):
    stream = submit(loop, replace(request("late", new=190), deadline=time.monotonic() - 1))
    assert collect(stream)[1].finish_reason is FinishReason.TIMEOUT


def test_stopping_ends_what_runs_with_a_reason(engine):
    loop = loops.running(engine)
    stream = submit(loop, request("cut", new=190))
    loop.stop()
    assert collect(stream)[1].finish_reason is FinishReason.SHUTDOWN
    with pytest.raises(GenerationFailed):
        submit(loop, request("after"))


def test_a_broken_step_fails_its_rows_and_the_next_request_is_right(loop, engine, monkeypatch, caplog):
    kv = random_kv(engine.frozen, 4)
    prefix = PrefixPayload("p", 4, 4, True, kv)
    expected, _ = collect(submit(loop, request("before", prefix=prefix)))

    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("device lost")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "compute", broken)
        _, last = collect(submit(loop, request("broken", prefix=prefix)))
    assert last.finish_reason is FinishReason.ERROR
    assert "RuntimeError" in last.error.message
    assert "device lost" in caplog.text
    assert collect(submit(loop, request("again", prefix=prefix)))[0] == expected


def test_a_loop_that_dies_answers_everyone_and_says_so(engine, monkeypatch, caplog):
    loop = loops.running(engine)
    assert loop.is_alive
    with monkeypatch.context() as patch:
        patch.setattr(engine.scheduler, "schedule", lambda: 1 / 0)
        _, last = collect(submit(loop, request("lost")))
    assert last.finish_reason is FinishReason.ERROR
    assert "must be restarted" in last.error.message
    assert "ZeroDivisionError" in caplog.text
    loop.stop()
    assert (loop.is_alive, loop.has_failed) == (False, True)


def test_a_request_that_breaks_every_step_it_is_in_ends_nothing_else(loop, engine, monkeypatch):
    compute = engine.compute

    def broken(rows, *unread):
        if any(row.sequence.request.id.startswith("poison") for row in rows):
            raise RuntimeError("an index is out of range")
        return compute(rows, *unread)

    expected, _ = collect(submit(loop, request("before")))
    monkeypatch.setattr(engine, "compute", broken)
    for number in range(10):
        assert collect(submit(loop, request(f"poison {number}")))[1].finish_reason is FinishReason.ERROR
    assert (loop.is_alive, loop.has_failed) == (True, False)
    assert collect(submit(loop, request("after")))[0] == expected


def test_a_step_that_breaks_behind_another_is_as_any_that_breaks(loop, engine, monkeypatch):
    compute = engine.compute

    def broken(rows, unread=None):
        if unread is not None:
            raise RuntimeError("device lost")
        return compute(rows)

    expected, _ = collect(submit(loop, request("before")))
    with monkeypatch.context() as patch:
        patch.setattr(engine, "runs_ahead", True)
        patch.setattr(engine, "compute", broken)
        assert collect(submit(loop, request("broken")))[1].finish_reason is FinishReason.ERROR
    assert collect(submit(loop, request("after")))[0] == expected


def test_a_device_that_fails_before_tokens_are_read_takes_the_step_behind_along(loop, engine, monkeypatch):
    """As a fault on a GPU shows: not when it is asked, but when it is waited for."""
    read, reads = Sampled.read, []

    def broken(sampled):
        reads.append(sampled)
        if len(reads) == 3:
            raise RuntimeError("device lost")
        return read(sampled)

    expected, _ = collect(submit(loop, request("before")))
    with monkeypatch.context() as patch:
        patch.setattr(Sampled, "read", broken)
        tokens, last = collect(submit(loop, request("broken")))
    assert last.finish_reason is FinishReason.ERROR
    assert tokens == expected[:2]
    assert not engine.is_ahead
    assert collect(submit(loop, request("after")))[0] == expected


def test_what_is_preloaded_does_not_wait_for_who_runs(loop, engine):
    prefix = PrefixPayload("there", 4, 4, True, random_kv(engine.frozen, 4))
    stream = submit(loop, request("long", new=190))
    loop.preload(prefix, "me").result(timeout=20)
    loop.release("there", "me")
    assert loop.stats().running == 1, "too short a request to tell"
    loop.abort("long")
    collect(stream)


def test_a_preload_that_is_let_go_of_before_it_is_begun_does_not_wait_for_who_runs(loop, engine, monkeypatch):
    compute = engine.compute

    def slow(*rows: object) -> Sampled:
        time.sleep(0.01)
        return compute(*rows)

    monkeypatch.setattr(engine, "compute", slow)
    prefix = PrefixPayload("gone", 4, 4, True, random_kv(engine.frozen, 4))
    stream = submit(loop, request("long", new=190))
    stream.get(timeout=20)
    with loop._changed:  # between two steps
        there = loop.preload(prefix, "me")
        loop.release("gone", "me")
    there.result(timeout=20)
    assert loop.stats().running == 1, "it waited for the end of whoever ran"
    loop.abort("long")
    collect(stream)


@pytest.mark.parametrize("is_wrong", [True, False])
def test_an_engine_whose_device_computes_no_more_is_given_up(engine, monkeypatch, caplog, is_wrong):
    loop = loops.running(engine)
    run = engine.runner.run

    def broken(batch):
        if is_wrong and not any(selection.row.sequence.request.id == "lost" for selection in batch.selections):
            return -run(batch)
        raise RuntimeError("device lost")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "run", broken)
        assert collect(submit(loop, request("lost")))[1].finish_reason is FinishReason.ERROR
        assert loop._ended.wait(20)
    assert (loop.is_alive, loop.has_failed) == (False, True)
    assert ("would be served wrong" if is_wrong else "device lost") in caplog.text
    with pytest.raises(GenerationFailed):
        submit(loop, request("after"))
    loop.stop()


def test_a_listener_that_raises_harms_nobody_else(loop, caplog):
    def gone(event: TokenEvent) -> None:
        raise RuntimeError("Event loop is closed")

    loop.submit(request("deaf"), gone)
    assert collect(submit(loop, request("fine")))[1].finish_reason is FinishReason.LENGTH
    assert "could not be delivered" in caplog.text


def test_a_prefix_that_overflows_fails_its_own_request_only(loop, engine):
    expected, _ = collect(submit(loop, request("alone", new=30)))
    bad = PrefixPayload("nan", 2, 2, True, torch.full_like(random_kv(engine.frozen, 2), torch.nan))
    streams = [submit(loop, request("good", new=30)), submit(loop, request("bad", new=30, prefix=bad))]
    assert collect(streams[0])[0] == expected
    assert isinstance(collect(streams[1])[1].error, PrefixNumerics)


def test_a_preloaded_prefix_is_on_the_device_when_the_future_is_done(loop, engine):
    kv = random_kv(engine.frozen, 4)
    prefix = PrefixPayload("kept", 4, 4, True, kv)
    loop.preload(prefix, "me").result(timeout=20)
    [resident] = [r for r in engine.scheduler.residency.residents() if r.payload.digest == "kept"]
    there = slice(resident.extent.start, resident.extent.end)
    assert torch.equal(engine.pool.keys[0][there].transpose(0, 1), kv[0, 0])
    before = loop.stats()
    assert before.prefixes_preloaded == 1
    kept, _ = collect(submit(loop, request("kept", prefix=prefix)))
    assert (loop.stats().prefix_hits, loop.stats().prefix_misses) == (before.prefix_hits + 1, before.prefix_misses)
    loop.release("kept", "me")
    assert loop.preloaded() == {}
    assert loop.stats().kv_slots_used < before.kv_slots_used
    assert collect(submit(loop, request("again", prefix=prefix)))[0] == kept


def test_a_prefix_that_nobody_reads_is_no_use_of_the_pool(loop, engine):
    before = loop.stats()
    prefix = PrefixPayload("counted", 8, 8, True, random_kv(engine.frozen, 8))
    collect(submit(loop, request("reader", prefix=prefix)))
    after = loop.stats()
    assert after.kv_usage == 0
    assert after.kv_slots_used >= 8
    assert after.prefix_bytes * before.kv_slots == after.kv_slots_used * _pool_bytes(engine)
    assert after.loads.counts[-1] == before.loads.counts[-1] + 1
    assert after.loads.total > before.loads.total


def test_every_step_is_measured(loop):
    before = [reading.counts[-1] for reading in (loop.stats().queue, loop.stats().prefill, loop.stats().decode)]
    streams = [submit(loop, request(f"r{i}", new=4)) for i in range(3)]
    for stream in streams:
        collect(stream)
    stats = loop.stats()
    for reading in (stats.step_rows, stats.step_prefixes, stats.step_tokens, stats.step_seconds):
        assert reading.counts[-1] == stats.steps > 0
    assert stats.step_tokens.total == 9 + 9, "three prompts of three, and three tokens of each but the last"
    assert stats.gaps.counts[-1] == 9
    after = [reading.counts[-1] for reading in (stats.queue, stats.prefill, stats.decode)]
    assert after == [count + 3 for count in before]
    assert (stats.alive, stats.running_of, stats.waiting_of) == (True, {}, {})


def test_who_runs_and_waits_is_known_by_tenant(loop):
    streams = [submit(loop, request(f"r{i}", new=190)) for i in range(6)]
    while not (stats := loop.stats()).running:
        time.sleep(0.001)
    assert (sum(stats.running_of.values()), sum(stats.waiting_of.values())) == (stats.running, stats.waiting)
    assert stats.running_of.keys() == {"t"}
    for index, stream in enumerate(streams):
        loop.abort(f"r{index}")
        collect(stream)


def test_a_preload_that_fails_says_so_and_the_engine_goes_on(loop, engine, monkeypatch, caplog):
    prefix = PrefixPayload("lost", 4, 4, True, random_kv(engine.frozen, 4))
    apply = engine.pool.apply
    with monkeypatch.context() as patch:
        patch.setattr(engine.pool, "apply", lambda t: 1 / 0 if t.payload is prefix else apply(t))
        with pytest.raises(GenerationFailed, match="ZeroDivisionError"):
            loop.preload(prefix, "me").result(timeout=20)
    assert "a step failed" in caplog.text
    assert collect(submit(loop, request("fine")))[1].finish_reason is FinishReason.LENGTH
    loop.release("lost", "me")


def test_a_preload_that_there_is_no_memory_for_says_so_and_costs_nobody_else_anything(loop, engine, monkeypatch):
    lost, there = (PrefixPayload(name, 4, 4, True, random_kv(engine.frozen, 4)) for name in ("lost", "there"))
    expected, _ = collect(submit(loop, request("alone", prefix=lost)))
    loop.preload(lost, "somebody").result(timeout=20)
    loop.release("lost", "somebody")
    apply, before = engine.pool.apply, loop.stats().shortages

    def short(transfer) -> None:
        if transfer.payload.digest == "lost":
            raise torch.OutOfMemoryError("CUDA out of memory")
        apply(transfer)

    with monkeypatch.context() as patch:
        patch.setattr(engine.pool, "apply", short)
        running = submit(loop, request("running", new=100))
        waiting = [loop.preload(payload, "me") for payload in (lost, there)]
        with pytest.raises(OutOfMemory):
            waiting[0].result(timeout=20)
        waiting[1].result(timeout=20)
        assert isinstance(collect(submit(loop, request("reader", prefix=lost)))[1].error, OutOfMemory)
    assert collect(running)[1].finish_reason is FinishReason.LENGTH
    assert loop.stats().shortages == before + 4
    assert collect(submit(loop, request("again", prefix=lost)))[0] == expected
    for payload in (lost, there):
        loop.release(payload.digest, "me")


def test_a_step_without_memory_is_no_failed_step(loop, engine, monkeypatch):
    expected = [collect(submit(loop, request(f"r{i}", new=12, temperature=1.0, seed=i)))[0] for i in range(4)]
    run = engine.runner.run

    def short(batch) -> torch.Tensor:
        if len(batch.slots) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(batch)

    monkeypatch.setattr(engine.runner, "run", short)
    streams = [submit(loop, request(f"r{i}", new=12, temperature=1.0, seed=i)) for i in range(4)]
    assert [collect(stream)[0] for stream in streams] == expected
    assert loop.stats().shortages


def test_whoever_waits_for_a_preload_when_the_loop_stops_is_told(engine):
    idle = EngineLoop(engine)
    prefix = PrefixPayload("kept", 4, 4, True, random_kv(engine.frozen, 4))
    waiting = idle.preload(prefix, "me")
    left = idle.preload(prefix, "me")
    left.cancel()
    idle.stop()
    with pytest.raises(GenerationFailed, match="shutting down"):
        waiting.result(timeout=20)
    with pytest.raises(GenerationFailed):
        idle.preload(prefix, "me")
    idle.release("kept", "me")


def _pool_bytes(engine: Engine) -> int:
    return engine.limits.slots * bytes_per_slot(engine.frozen.geometry, engine.frozen.dtype)
