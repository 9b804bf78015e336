"""An engine with as many KV slots as the settings ask for, or else as there is memory for."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from prefix_store.model import shortage
from prefix_store.model.frozen import FrozenModel
from server.engine import budget, device_memory
from server.engine.budget import Budget, gib
from server.engine.device_memory import DeviceMemory
from server.engine.engine import Engine, choose_slots, least_slots
from server.engine.kv_pool import bytes_per_slot
from server.scheduler.limits import Limits

# Of a machine's memory, which others want too.
POOL_SHARE = 0.25


def start(frozen: FrozenModel, limits: Limits, *, int8: bool, compiled: bool, say: Callable[[str], None]) -> Engine:
    """An engine. `limits` has the slots that are asked for, 0 for as many as there is memory for.

    On a device with memory of its own it begins with as few slots as may be, runs the largest steps to see what they
    take, and has the rest for its pool. Raises ModelUnsupported, and SystemExit with one line where there is no room.
    """
    asked = limits.slots
    if asked and asked < frozen.context_length:
        raise SystemExit(f"antefix: ANTEFIX_KV_SLOTS={asked} is less than the model's context, {frozen.context_length}")
    memory = device_memory.of(frozen.device)
    if memory is None:
        slots = asked or choose_slots(frozen, limits.rows, int(POOL_SHARE * host_memory()))
        return Engine(frozen, replace(limits, slots=slots), int8=int8)
    engine, found = _measured(frozen, limits, memory, int8=int8, compiled=compiled)
    if asked > found.slots:
        raise SystemExit(f"antefix: ANTEFIX_KV_SLOTS={asked} is too large: {found.shortage()}")
    if not asked and found.slots < least_slots(frozen):
        raise SystemExit(f"antefix: {_no_room(frozen)}: {found.shortage()}")
    engine.resize(asked or choose_slots(frozen, limits.rows, found.pool))
    engine.record(compiled=compiled)
    say(found.line(engine.limits.slots))
    return engine


def host_memory() -> int:
    """Bytes of this machine, or of the container if it has less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(machine, int(text)) if text.isdigit() else machine


def _measured(
    frozen: FrozenModel, limits: Limits, memory: DeviceMemory, *, int8: bool, compiled: bool
) -> tuple[Engine, Budget]:
    least, free, total = least_slots(frozen), memory.free(), memory.total()
    try:
        engine = Engine(frozen, replace(limits, slots=least), int8=int8)
        return engine, budget.measure(engine, memory, compiled=compiled)
    except Exception as error:
        if not shortage.ran_out(error):
            raise
    raise SystemExit(
        f"antefix: {_no_room(frozen)}: {gib(free)} of the device's {gib(total)} were free beside the model, and a step "
        f"of {limits.step_tokens} tokens, ANTEFIX_STEP_TOKENS, takes the rest or more"
    )


def _no_room(frozen: FrozenModel) -> str:
    least = least_slots(frozen)
    needed = least * bytes_per_slot(frozen.geometry, frozen.dtype)
    return f"there is no room for one context, which takes {least} KV slots or {gib(needed)}"
