"""A recorded step, played for other requests than it was recorded with, is that step run anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from prefix_store.errors import ModelUnsupported
from prefix_store.model.frozen import FrozenModel
from server.engine import attention
from server.engine.attention import plain, segments
from server.engine.engine import Engine
from server.engine.step_buffers import StepBuffers
from server.engine.step_graphs import Recorder, StepGraphs
from tests.models import FAMILIES, random_kv, random_memory, tiny_frozen, tiny_model
from tests.parity.harness import (
    TOLERANCE,
    alone,
    make_engine,
    memory_payload,
    payload,
    run_mixed,
    sampled,
    worst_difference,
)
from tests.parity.test_families import make_cases, payloads
from tests.server.engine import recording
from tests.server.engine.attention import listed

BUCKETS = (2, 4, 16, 32)
LIMITS = {"slots": 400, "rows": 9, "step_tokens": 32}


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    listed.pretend(monkeypatch, BUCKETS)


def recorded_engine(frozen: FrozenModel, record: Callable = recording.record, **limits: int) -> Engine:
    engine = make_engine(frozen, listed.NAME, **{**LIMITS, **limits})
    runner = engine.runner._runner
    runner.record(record, engine.limits)
    return engine


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each step whether it was played."""
    seen: list[bool] = []
    run = StepGraphs.run

    def noted(graphs: StepGraphs, batch: object) -> torch.Tensor | None:
        logits = run(graphs, batch)
        seen.append(logits is not None)
        return logits

    monkeypatch.setattr(StepGraphs, "run", noted)
    return seen


@pytest.mark.parametrize("family", sampled(FAMILIES))
def test_played_steps_are_transformers_own(family: str, played: list[bool]) -> None:
    served, plain = tiny_frozen(family), tiny_model(family)
    cases = make_cases(served)
    engine = recorded_engine(served)
    tokens = run_mixed(engine, cases, payloads(cases))
    truth = [alone(plain, case) for case in cases]
    assert [tokens[str(index)] for index in range(len(cases))] == [found for found, _ in truth]
    assert worst_difference(engine, [logits for _, logits in truth]) < TOLERANCE
    assert len(played) > 10
    assert all(played)


def test_memories_and_preempted_rows_are_played_too(played: list[bool]) -> None:
    served = tiny_frozen("llama")
    cases = [replace(case, new=70, kv=None if i % 2 else case.kv) for i, case in enumerate(make_cases(served))]
    memory = memory_payload(served, random_memory(served, seed=1), "memory", "gelu")
    prefixes = [memory if i % 2 else found for i, found in enumerate(payloads(cases))]
    engine, eager = recorded_engine(served), make_engine(served, "plain", **LIMITS)
    assert run_mixed(engine, cases, prefixes) == run_mixed(eager, cases, prefixes)
    expected = [torch.stack(eager.runner.recorded[str(index)]) for index in range(len(cases))]
    assert worst_difference(engine, expected) < TOLERANCE
    assert engine.scheduler.admission.preemptions > 0
    assert all(played)


def test_a_step_that_no_bucket_holds_runs_as_it_is(played: list[bool]) -> None:
    served, plain = tiny_frozen("gpt2"), tiny_model("gpt2")
    cases = [replace(case, prompt=case.prompt * 3) for case in make_cases(served)]
    engine = recorded_engine(served, step_tokens=64)
    tokens = run_mixed(engine, cases, payloads(cases))
    assert [tokens[str(index)] for index in range(len(cases))] == [alone(plain, case)[0] for case in cases]
    assert any(played)
    assert not all(played)


def mixed(engine: Engine, served: FrozenModel) -> dict[str, list[int]] | None:
    """Tokens, or None where logits are no numbers."""
    cases = make_cases(served)
    try:
        return run_mixed(engine, cases, payloads(cases))
    except AssertionError:
        return None


def test_what_stands_at_another_address_is_not_played(monkeypatch: pytest.MonkeyPatch) -> None:
    served = tiny_frozen("llama")
    right = mixed(recorded_engine(served), served)
    fill = StepBuffers.fill

    def elsewhere(buffers: StepBuffers, batch: object) -> None:
        buffers._device = buffers._device.clone()
        fill(buffers, batch)

    monkeypatch.setattr(StepBuffers, "fill", elsewhere)
    assert mixed(recorded_engine(served), served) != right


def test_a_number_of_the_recorded_step_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    served = tiny_frozen("llama")
    right = mixed(recorded_engine(served), served)
    monkeypatch.setitem(attention.BACKENDS, listed.NAME, reading_the_host)
    assert mixed(make_engine(served, listed.NAME, **LIMITS), served) == right
    assert mixed(recorded_engine(served), served) != right


def reading_the_host(*tensors: torch.Tensor, memories: None = None, **options: object) -> torch.Tensor:
    """Reads the list on the host: right when it is run, and wrong when it is played."""
    return segments.attend(plain.attend_item, *tensors, **options)


def test_a_model_that_makes_the_host_wait_cannot_be_recorded() -> None:
    served = tiny_frozen("llama")

    def waiting(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        return recording.record(lambda: run() * run().max().item())

    with pytest.raises(recording.HostWaits, match="aten::item"):
        recorded_engine(served, waiting)


@pytest.mark.parametrize("error", [RuntimeError("the card has no room"), ModelUnsupported("logits are off by 3")])
def test_an_engine_whose_steps_cannot_be_recorded_serves_without(
    monkeypatch: pytest.MonkeyPatch, played: list[bool], error: Exception
) -> None:
    served = tiny_frozen("gpt2")
    engine = make_engine(served, listed.NAME, **LIMITS)
    right = mixed(engine, served)

    def failing() -> Recorder:
        raise error

    monkeypatch.setattr("server.engine.engine.CudaRecorder", failing)
    again = make_engine(served, listed.NAME, **LIMITS)
    again.runner = again.runner._runner
    again.runner.record(recording.record, again.limits)
    monkeypatch.setattr(type(served), "device", torch.device("cuda"))
    again.record(compiled=True)
    monkeypatch.undo()
    assert mixed(again, served) == right
    assert played == []


def test_padding_writes_where_nobody_reads() -> None:
    served = tiny_frozen("opt")
    engine = recorded_engine(served)
    kv = random_kv(served, 7, seed=3)
    engine.pool.keys.fill_(torch.nan)
    engine.pool.values.fill_(torch.nan)
    cases = [replace(case, kv=kv) for case in make_cases(served)[:3]]
    run_mixed(engine, cases, [payload(kv, "one")] * 3)
    written = ~engine.pool.keys.isnan().flatten(2).any(-1).any(0)
    assert written[-1]
    assert int(written.sum()) <= engine.limits.slots // 2
