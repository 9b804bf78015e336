"""What a device's memory goes to: the model, its largest steps, a margin, and with all the rest the pool."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from server.engine import largest_step
from server.engine.device_memory import DeviceMemory
from server.engine.engine import Engine
from server.engine.kv_pool import bytes_per_slot

# Of all of the device: for what torch rounds up and cannot join, for kernels' own code, and for prefixes on their way.
MARGIN = 0.05
GIB = 1 << 30


@dataclass(frozen=True)
class Budget:
    """Bytes. `free`: beside the model and without a pool; `step`: what recorded steps and the largest one take; `slot`:
    one of the pool.
    """

    total: int
    free: int
    model: int
    step: int
    slot: int

    @property
    def pool(self) -> int:
        """What the pool may take."""
        return max(0, self.free - self.step - self.margin)

    @property
    def margin(self) -> int:
        """What is left to itself."""
        return int(MARGIN * self.total)

    @property
    def slots(self) -> int:
        """How many fit."""
        return self.pool // self.slot

    def line(self, slots: int) -> str:
        """For whoever started it, with a pool of so many slots."""
        return (
            f"device memory: model {gib(self.model)}, a step {gib(self.step)}, "
            f"pool {gib(slots * self.slot)} = {slots} slots"
        )

    def shortage(self) -> str:
        """Why there are not more slots."""
        return (
            f"{gib(self.free)} of the device's {gib(self.total)} are free beside the model; a step takes up to "
            f"{gib(self.step)}, {gib(self.margin)} stay free, and {gib(self.pool)} hold {self.slots} slots"
        )


def measure(engine: Engine, memory: DeviceMemory, *, compiled: bool) -> Budget:
    """Records steps and runs the largest on an engine with nothing in flight.

    Raises what torch raises where memory runs out.
    """
    slot = bytes_per_slot(engine.frozen.geometry, engine.frozen.dtype)
    pool = slot * engine.limits.slots
    step = memory.peak(partial(_take_most, engine, compiled))
    return Budget(memory.total(), memory.free() + pool, memory.held() - pool, step, slot)


def _take_most(engine: Engine, compiled: bool) -> None:
    engine.record(compiled=compiled)
    largest_step.run(engine)


def gib(size: int) -> str:
    """`13.5 GiB`."""
    return f"{size / GIB:.1f} GiB"
