"""How many slots an engine gets, on a CPU and on a device whose memory is made up."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from prefix_store.model.frozen import FrozenModel
from server import sizing
from server.engine import device_memory, largest_step
from server.engine.budget import MARGIN
from server.engine.engine import Engine, choose_slots, least_slots
from server.engine.kv_pool import bytes_per_slot
from server.scheduler.limits import Limits
from tests.models import tiny_frozen

STEP = 1 << 20


@dataclass
class Memory:
    """Of a device of `size` bytes with `others`' on it: pools are counted as they are made, a step takes `step`."""

    size: int
    others: int = 0
    step: int = STEP
    pool: int = 0

    def total(self) -> int:
        return self.size

    def free(self) -> int:
        return self.size - self.others - self.pool

    def held(self) -> int:
        return self.others + self.pool

    def peak(self, work: Callable[[], None]) -> int:
        work()
        if self.step > self.free():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.step

    def release(self) -> None:
        pass


@pytest.fixture(name="frozen", scope="module")
def tiny() -> FrozenModel:
    return tiny_frozen("llama")


@pytest.fixture
def device(frozen: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Memory]:
    """Makes the CPU a device with so much memory."""

    def make(slots: float, **numbers: int) -> Memory:
        """Room for so many slots beside a step, and the margin."""
        slot = bytes_per_slot(frozen.geometry, frozen.dtype)
        step = numbers.get("step", STEP)
        memory = Memory(int((slots * slot + step + numbers.get("others", 0)) / (1 - MARGIN)) + 1, **numbers)
        monkeypatch.setattr(device_memory, "of", lambda device: memory)
        make_pool = Engine._pool

        def counted(engine: Engine, slots: int):
            memory.pool = 0
            if slots * slot > memory.free():
                raise torch.OutOfMemoryError("CUDA out of memory")
            memory.pool = slots * slot
            return make_pool(engine, slots)

        monkeypatch.setattr(Engine, "_pool", counted)
        return memory

    return make


def start(frozen: FrozenModel, asked: int = 0, rows: int = 4) -> tuple[Engine, list[str]]:
    said: list[str] = []
    limits = Limits(asked, rows, 32, frozen.context_length, 8)
    copied = replace(frozen, model=copy.deepcopy(frozen.model))  # for an engine takes over what it is given
    return sizing.start(copied, limits, int8=False, compiled=False, say=said.append), said


def test_the_pool_gets_what_is_free_beside_the_largest_step_and_it_is_said(frozen, device, monkeypatch):
    ran: list[int] = []
    run = largest_step.run

    def seen(engine: Engine) -> None:
        ran.append(engine.limits.slots)
        run(engine)

    monkeypatch.setattr("server.engine.budget.largest_step.run", seen)
    memory = device(1500, others=5 << 20)
    engine, said = start(frozen)
    assert ran == [least_slots(frozen)], "measured once, on as small a pool as can be"
    assert engine.limits.slots == engine.pool.slots == 1500
    assert memory.free() >= STEP + MARGIN * memory.total()
    assert len(said) == 1
    assert said[0].startswith("device memory: model 0.0 GiB, a step 0.0 GiB, pool ")
    assert said[0].endswith(" = 1500 slots")


def test_no_more_than_all_rows_could_use_is_taken(frozen, device):
    device(1e6)
    engine, _ = start(frozen, rows=2)
    assert engine.limits.slots == choose_slots(frozen, 2, 1 << 40) == 4 * frozen.context_length


def test_a_larger_step_leaves_a_smaller_pool(frozen, device):
    memory = device(1500)
    slot = bytes_per_slot(frozen.geometry, frozen.dtype)
    memory.step += 100 * slot
    assert start(frozen)[0].limits.slots == 1400


def test_as_many_slots_as_fit_may_be_asked_for_and_not_one_more(frozen, device):
    device(1500)
    assert start(frozen, asked=1500)[0].limits.slots == 1500
    with pytest.raises(SystemExit, match=r"ANTEFIX_KV_SLOTS=1501 is too large: .* hold 1500 slots$"):
        start(frozen, asked=1501)


def test_no_room_for_one_context_is_one_line_with_what_was_needed_and_what_there_was(frozen, device):
    least = least_slots(frozen)
    device(least)
    assert start(frozen)[0].limits.slots == least
    device(least - 1)
    line = rf"^antefix: there is no room for one context, which takes {least} KV slots or .* hold {least - 1} slots$"
    with pytest.raises(SystemExit, match=line):
        start(frozen)


@pytest.mark.parametrize("slots", [-600, 10])
def test_nor_is_memory_that_runs_out_while_it_is_measured_more_than_one_line(frozen, device, slots):
    """Too little for the smallest pool, or for a step beside it."""
    device(slots, step=8 * STEP if slots < 0 else STEP)
    with pytest.raises(
        SystemExit, match=r"no room for one context.* were free beside the model, .*ANTEFIX_STEP_TOKENS"
    ):
        start(frozen)


def test_another_failure_keeps_its_own_name(frozen, device, monkeypatch):
    device(1500)
    monkeypatch.setattr("server.engine.budget.largest_step.run", lambda engine: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        start(frozen)


def test_on_a_cpu_it_is_a_share_of_the_machine_s_memory_and_nothing_is_said(frozen, monkeypatch):
    slot = bytes_per_slot(frozen.geometry, frozen.dtype)
    monkeypatch.setattr(sizing, "host_memory", lambda: int(2000 * slot / sizing.POOL_SHARE))
    engine, said = start(frozen)
    assert (engine.limits.slots, said) == (2000, [])
    assert start(frozen, asked=5000)[0].limits.slots == 5000


@pytest.mark.parametrize("on_device", [False, True])
def test_fewer_slots_than_the_context_are_refused(frozen, device, on_device):
    if on_device:
        device(1500)
    with pytest.raises(
        SystemExit, match=f"ANTEFIX_KV_SLOTS=100 is less than the model's context, {frozen.context_length}"
    ):
        start(frozen, asked=100)
