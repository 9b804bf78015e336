"""What a copy may still have to read is not written: the host's side of a step's buffers, on a device that lags.

A device that works by itself has read a step's buffer for sure only when the host has waited for something that the
device was asked for after it. Here the copies are noted, and so is what each wait of the host proves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from server.engine import step_buffers, transit
from server.engine.batch import Batch, build
from server.engine.engine import Engine
from server.engine.sampler import sample
from server.engine.step_buffers import StepBuffers
from server.scheduler.messages import FinishReason
from server.scheduler.plan import Row, RowResult, StepPlan
from tests.models import tiny_frozen
from tests.parity import test_step_graphs
from tests.parity.harness import make_engine, request, run_mixed
from tests.parity.test_ahead import Ahead
from tests.parity.test_families import make_cases, payloads
from tests.server.engine.attention import listed


class Lagging:
    """`early`: how often a host buffer was written though nothing proves that its last copy has been made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
        self.fills = self.done = self.early = 0
        self._last: dict[int, int] = {}
        fill, lag = StepBuffers.fill, self

        def noted(buffers: StepBuffers, batch: Batch) -> None:
            host = id(buffers._hosts[0][0])
            lag.fills += 1
            fill(buffers, batch)
            lag.early += lag._last.get(host, 0) > lag.done
            lag._last[host] = lag.fills

        class Noted(transit.Mark):
            def __init__(self, device: torch.device) -> None:
                self._behind = lag.fills

            def wait(self) -> None:
                lag.done = max(lag.done, self._behind)

        release = engine._release

        def synchronised() -> None:
            lag.done = lag.fills
            release()

        monkeypatch.setattr(step_buffers.StepBuffers, "fill", noted)
        for module in (transit, step_buffers):
            monkeypatch.setattr(module, "Mark", Noted)
        monkeypatch.setattr(engine, "_release", synchronised)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    listed.pretend(monkeypatch, test_step_graphs.BUCKETS)
    return test_step_graphs.recorded_engine(tiny_frozen("llama"), slots=1000)


def cases(new: int = 20) -> list:
    return [replace(case, new=new, arrives=0) for case in make_cases(tiny_frozen("llama"))]


def test_steps_that_run_ahead_write_no_buffer_too_early(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    lag, ahead = Lagging(monkeypatch, engine), Ahead(engine)
    run_mixed(engine, cases(), payloads(cases()))
    assert any(ahead.steps)
    assert (lag.fills > 20, lag.early) == (True, 0)


@pytest.mark.parametrize("most", [2, 1])
def test_a_step_in_pieces_writes_no_buffer_too_early(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """On a GPU this is a piece that is computed with another piece's rows: one tenant's tokens given to another."""
    run = engine.runner.run

    def short(batch: Batch) -> torch.Tensor:
        if len(batch.slots) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(batch)

    engine.runner.run = short  # type: ignore[method-assign]
    lag = Lagging(monkeypatch, engine)
    run_mixed(engine, cases(), payloads(cases()))
    assert lag.fills > 20
    assert lag.early == 0


def test_a_step_computed_in_vain_is_not_overwritten(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows of the step that was launched behind have ended, so nobody ever waits for it."""
    lag, ahead = Lagging(monkeypatch, engine), Ahead(engine)
    made: list[Any] = [replace(cases(100)[0], prompt=(5,))]  # a prompt that fits the bucket of a step that decodes
    prefix = payloads(made)[0]
    for number in range(6):
        engine.scheduler.add(request(f"{number}", made[0], prefix), seed=number)
        for _ in range(4):
            engine.step()
        engine.scheduler.abort(f"{number}", FinishReason.ABORT)
    assert any(ahead.steps)
    assert lag.early == 0


class LateDevice:
    """Does what it is asked for in order, and no sooner than the host waits for it; `most` tokens fit at a time."""

    def __init__(self, engine: Engine, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self._engine, self._most = engine, most
        self._asked: deque[Callable[[], None]] = deque()
        engine.compute = self.compute  # type: ignore[method-assign]
        device = self

        class LateMark(transit.Mark):
            def __init__(self, _: torch.device) -> None:
                self._behind = list(device._asked)

            def wait(self) -> None:
                while any(asked in device._asked for asked in self._behind):
                    device._asked.popleft()()

        monkeypatch.setattr(step_buffers, "Mark", LateMark)

    def compute(self, rows: Sequence[Row], unread: None = None) -> LateTokens:
        if sum(row.count for row in rows) > self._most:
            self.catch_up()  # what follows gives memory back, which waits
            raise torch.OutOfMemoryError("CUDA out of memory")
        runner: Any = self._engine.runner
        batch = build(StepPlan((), tuple(rows)), runner.windows)
        recordings = runner._runner._graphs._recordings
        recording = next(recording for recording in recordings if recording.buffers.bucket.holds(batch))
        buffers, real = recording.buffers, recording.buffers._device
        copy = lambda host, **_: self._asked.append(lambda: real.copy_(host))  # noqa: E731
        buffers._device = SimpleNamespace(copy_=copy, device=real.device)
        buffers.fill(batch)
        buffers._device = real
        late = LateTokens(self)

        def computed() -> None:
            recording.play()
            late.results = sample(recording.logits[: len(batch.selected)].clone(), batch.selections).read()

        self._asked.append(computed)
        return late

    def catch_up(self) -> None:
        while self._asked:
            self._asked.popleft()()


class LateTokens:
    """What the device has not computed yet."""

    unread = None

    def __init__(self, device: LateDevice) -> None:
        self._device = device
        self.results: list[RowResult] = []

    def read(self) -> list[RowResult]:
        self._device.catch_up()
        return self.results


@pytest.mark.parametrize("most", [32, 16, 4, 2, 1])
def test_however_late_the_device_is_rows_get_their_own_tokens(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    right = run_mixed(make_engine(tiny_frozen("llama")), cases(), payloads(cases()))
    LateDevice(engine, most, monkeypatch)
    assert run_mixed(engine, cases(), payloads(cases())) == right
