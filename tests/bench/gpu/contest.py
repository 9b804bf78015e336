"""The workload of the CPU's benchmark on a GPU, by the engine and by what a user would pick instead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tests.bench import agreement, peers, results
from tests.bench.arms import BARE, OURS, Antefix, Arm
from tests.bench.drive import drain, engine_of
from tests.bench.gpu import aims, machine
from tests.bench.gpu.sizes import Setup
from tests.bench.shapes import Shape
from tests.bench.workload import Item, payloads

Found = Iterator[tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Entry:
    """An arm and its part of the workload: PEFT's rate does not depend on how many requests it gets."""

    arm: Arm
    items: Sequence[Item]


def contest(setup: Setup, shape: Shape) -> Found:
    """Each contestant in turn beside the engine, which holds the model with all prefixes on the device."""
    size, device, workload = setup.size, setup.device, setup.size.workload
    items = workload.items(shape.vocabulary)
    frozen = shape.frozen(size.dtype, device=device)
    prefixes = payloads(workload, frozen.geometry, size.dtype)
    slots = workload.requests * (workload.prompt_tokens[1] + workload.new_tokens + workload.virtual_tokens)
    engine = engine_of(frozen, slots=2 * slots, rows=workload.requests)
    ours = Entry(Antefix(OURS, engine, workload, prefixes), items)
    drain(engine, replace(workload, new_tokens=1).requests_for(items, prefixes))
    peft: peers.PeftSwitched | None = None

    def with_peft() -> Iterator[Entry]:
        nonlocal peft
        peft = peers.PeftSwitched(peers.peft_model(shape, size.dtype, workload, device), workload)
        yield Entry(peft, items[: size.switched])
        yield Entry(peers.PeftGrouped(peft.model, workload), [item for item in items if item.prefix < size.switched])

    def logits() -> dict[str, Any]:
        assert peft is not None
        few = items[: size.switched]
        found = agreement.closeness(engine, workload, few, prefixes, peft.next_logits)
        found.check()
        return {"worst": found.worst, "control": found.control, "passed": True}

    yield BARE, machine.tried(device, lambda: _rates(setup, ours, Entry(Antefix(BARE, engine, workload), items)))
    entries = with_peft()
    for name in (peers.SWITCHED, peers.GROUPED):
        found = machine.tried(device, lambda: _rates(setup, ours, next(entries)))
        yield name, _judged(shape, name, found)
        if name == peers.SWITCHED:
            yield "logits against PEFT's", machine.tried(device, logits)
    peft = None
    machine.release(device)
    found = machine.tried(device, lambda: _continuous(setup, shape, ours, items))
    yield peers.CONTINUOUS, _judged(shape, peers.CONTINUOUS, found)


def _continuous(setup: Setup, shape: Shape, ours: Entry, items: Sequence[Item]) -> dict[str, Any]:
    model = shape.model("sdpa", setup.size.dtype, device=setup.device)
    arm = peers.ContinuousBatching(model, setup.size.workload, items)
    try:
        return _rates(setup, ours, Entry(arm, items))
    finally:
        arm.close()


def _rates(setup: Setup, ours: Entry, theirs: Entry) -> dict[str, Any]:
    """New tokens a second of both, in turns, after a round that nobody times."""
    rates: list[list[float]] = [[], []]
    for number in range(1 + setup.size.rounds):
        for entry, found in zip((ours, theirs), rates, strict=True):
            taken = machine.seconds(setup.device, lambda entry=entry: entry.arm.run(entry.items))
            if number:
                found.append(len(entry.items) * setup.size.workload.new_tokens / taken)
    ratio = results.paired_ratio(*rates)
    return {"tokens_per_second": [round(rate, 2) for rate in rates[1]], "ours": [round(rate, 2) for rate in rates[0]],
            "ratio": round(ratio, 3)}  # fmt: skip


def _judged(shape: Shape, name: str, found: dict[str, Any]) -> dict[str, Any]:
    if "failed" in found:
        return found
    return {**found, "reached": {aims.against(shape, name): found["ratio"]}}
