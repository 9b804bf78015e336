"""Decoding alone: tokens a second of a full batch, beside what the bytes that a step must move allow.

The ideal reads every weight once a step, every row's own keys and values, and each distinct prefix once, at the rate at
which the device copies. It counts no logits, no activations and no Python.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from server.engine.attention import BACKENDS, lists_device
from server.engine.attention.work import Mask, Part, WorkItem
from server.engine.engine import Engine, default_backend
from server.engine.kv_pool import bytes_per_slot
from server.scheduler.messages import FinishReason, PrefixPayload
from server.scheduler.scheduler import Limits
from tests.bench import results
from tests.bench.drive import is_decoding, submit
from tests.bench.gpu import aims, machine
from tests.bench.gpu.sizes import Decoding, Setup
from tests.bench.shapes import Shape
from tests.bench.workload import Workload, payload

Found = Iterator[tuple[str, dict[str, Any]]]
SLACK_TOKENS = 64  # decoded by the rows that come first, while the others' prompts run
SPARED = 0.1  # of the device's memory, for what is no weight and no slot
LAYERS, ATTENDED = 2, 20  # of the kernel alone: pools that take turns, and how often


@dataclass(frozen=True)
class Cell:
    """A batch that decodes: rows, and how many prefixes of so many tokens stand before them; 0 for none."""

    rows: int
    virtual_tokens: int
    distinct: int

    @property
    def name(self) -> str:
        """How results call it."""
        if not self.distinct:
            return f"B={self.rows}, no prefix"
        return f"B={self.rows}, P={self.virtual_tokens:,}, {self.distinct} distinct"


class Decoder:
    """An engine of random weights, made when it is first needed, and anew after a failure."""

    def __init__(self, setup: Setup, shape: Shape, cells: list[Cell]) -> None:
        self._setup, self._shape, self._cells = setup, shape, cells
        self._engine: Engine | None = None
        self._kvs: dict[int, torch.Tensor] = {}
        self._weights, self._backend = 0, ""

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Rates of a cell, or what it failed with."""
        found = machine.tried(self._setup.device, lambda: self._measure(cell))
        if "failed" in found:
            self._engine = None
            machine.release(self._setup.device)
        return found

    def _measure(self, cell: Cell) -> dict[str, Any]:
        size, device, engine = self._setup.size, self._setup.device, self._made()
        asked = size.warm + size.windows * size.steps
        prompt = size.own - size.warm - size.windows * size.steps // 2
        prefixes, new = cell.distinct or 1, asked + SLACK_TOKENS
        workload = Workload(cell.rows, prefixes, cell.virtual_tokens, (prompt, prompt), new)
        items = workload.items(self._shape.vocabulary)
        requests = workload.requests_for(items, self._payloads(cell) if cell.distinct else None)
        submit(engine, requests)
        while not is_decoding(engine):
            engine.step()
        for _ in range(size.warm):
            engine.step()
        windows, own = [], []
        for _ in range(size.windows):
            own.append(self._own_tokens(engine))
            windows.append(machine.seconds(device, lambda: [engine.step() for _ in range(size.steps)]) / size.steps)
        own.append(self._own_tokens(engine))
        if len(engine.scheduler.running) != cell.rows:
            raise RuntimeError(f"{cell.rows - len(engine.scheduler.running)} rows ended before they were measured")
        for request in requests:
            engine.scheduler.abort(request.id, FinishReason.ABORT)
        seconds = statistics.median(windows)
        ideal = self._ideal_seconds(engine, cell, statistics.mean(own))
        return {
            "tokens_per_second": round(cell.rows / seconds, 1),
            "ms_a_step": round(1000 * seconds, 3),
            "own_tokens": round(statistics.mean(own) / cell.rows, 1),
            "ideal_ms_a_step": round(1000 * ideal, 3),
            "share_of_ideal": round(ideal / seconds, 4),
            "backend": self._backend,
        }

    def _ideal_seconds(self, engine: Engine, cell: Cell, own: float) -> float:
        slots = own + cell.distinct * cell.virtual_tokens
        kv = slots * bytes_per_slot(engine.frozen.geometry, engine.frozen.dtype)
        return (self._weights + kv) / self._setup.copy_rate

    def _own_tokens(self, engine: Engine) -> int:
        return sum(len(sequence.tokens) for sequence in engine.scheduler.running)

    def _made(self) -> Engine:
        if self._engine is None:
            setup, size = self._setup, self._setup.size
            machine.release(setup.device)  # what another decoder had
            frozen = self._shape.frozen(size.dtype, device=setup.device)
            self._weights = sum(parameter.nbytes for parameter in frozen.model.parameters())
            self._backend = default_backend(frozen)
            room = machine.free_bytes(setup.device) - SPARED * machine.total_bytes(setup.device)
            affordable = int(room / bytes_per_slot(frozen.geometry, frozen.dtype))
            slots = min(affordable, max(map(self._slots, self._cells)))
            limits = Limits(
                slots=slots,
                rows=max(cell.rows for cell in self._cells),
                step_tokens=size.prefill_tokens,
                context_length=min(frozen.context_length, slots),
                waiting=1024,
            )
            # The clock stands still: prompts then take all of a step, and rows begin to decode almost together.
            self._engine = Engine(frozen, limits, clock=lambda: 0.0)
            self._engine.record()
        return self._engine

    def _slots(self, cell: Cell) -> int:
        size = self._setup.size
        return cell.distinct * cell.virtual_tokens + cell.rows * (size.own + size.windows * size.steps + SLACK_TOKENS)

    def _payloads(self, cell: Cell) -> list[PrefixPayload]:
        """Prefixes of one content; to the engine, which goes by digest, they are different ones."""
        if cell.virtual_tokens not in self._kvs:
            frozen = self._made().frozen
            layers, two, heads, dim = frozen.geometry.kv_shape
            shape = (layers, two, heads, cell.virtual_tokens, dim)
            self._kvs[cell.virtual_tokens] = torch.randn(shape, dtype=frozen.dtype, device=frozen.device)
        one = payload("", self._kvs[cell.virtual_tokens])
        return [replace(one, digest=f"{cell.virtual_tokens}/{number}") for number in range(cell.distinct)]


def goals(setup: Setup, decoding: Decoding) -> Found:
    """What a model has goals for: its share of the ideal, prefixes against none, many against one."""
    size, short = setup.size, setup.size.virtual_tokens[0]
    none, one, few, many = (Cell(decoding.rows, short, distinct) for distinct in (0, 1, *size.distinct))
    decoder = Decoder(setup, decoding.shape, [few, many])
    rates: dict[Cell, list[float]] = {}
    for number, cell in itertools.product(range(size.rounds), (none, one, few, many)):
        found = decoder.measure(cell)
        if "failed" not in found:
            rates.setdefault(cell, []).append(found["tokens_per_second"])
            if cell == few:
                found["reached"] = {aims.share(decoding): found["share_of_ideal"]}
        yield f"{cell.name}, round {number + 1}", found
    for name, ours, theirs in (
        (aims.mixed(decoding), many, none),
        (aims.distinct(decoding, size), many, one),
    ):
        if len(rates.get(ours, ())) == len(rates.get(theirs, ())) > 0:
            ratio = results.paired_ratio(rates[ours], rates[theirs])
            yield name, {"ratio": round(ratio, 4), "reached": {name: ratio}}


def shared(setup: Setup, decoding: Decoding) -> Found:
    """A long prefix that all rows read, against one that each has for itself."""
    size, rows, long = setup.size, setup.size.rows[0], setup.size.virtual_tokens[1]
    once, each = Cell(rows, long, 1), Cell(rows, long, rows)
    decoder = Decoder(setup, decoding.shape, [once, each])
    rates = []
    for cell in (once, each):
        found = decoder.measure(cell)
        rates.append(found.get("tokens_per_second"))
        yield cell.name, found
    if None not in rates:
        name = aims.copies(decoding.shape, size)
        yield name, {"ratio": round(rates[0] / rates[1], 4), "reached": {name: rates[0] / rates[1]}}


def others(setup: Setup, decoding: Decoding) -> Found:
    """The rest of what a model is measured at."""
    size = setup.size
    grid = [Cell(*numbers) for numbers in itertools.product(size.rows, size.virtual_tokens, size.distinct)]
    short = size.virtual_tokens[0]
    cells = [
        cell
        for cell in grid
        if (cell.rows, cell.virtual_tokens) != (decoding.rows, short)
        and aims.holds(decoding.shape, cell.virtual_tokens, size)
    ]
    # a pool for the largest of them may not fit, and then only that one fails
    for cell in cells:
        yield cell.name, Decoder(setup, decoding.shape, [cell]).measure(cell)


@torch.inference_mode()
def kernel(setup: Setup) -> Found:
    """The attention operator alone at the shapes of the first model's goal: the bytes that it reads a second."""
    decoding, size, device = setup.size.decoding[0], setup.size, torch.device(setup.device)
    frozen = decoding.shape.changed(num_hidden_layers=1).frozen(size.dtype, device=setup.device)
    geometry, backend = frozen.geometry, default_backend(frozen)
    scale = geometry.head_dim**-0.5
    query = torch.randn(decoding.rows, geometry.query_heads, geometry.head_dim, dtype=size.dtype, device=device)
    for prefix, distinct in itertools.product(size.virtual_tokens, size.distinct):
        slots = distinct * prefix + decoding.rows * size.own
        shape = (LAYERS, slots, geometry.kv_heads, geometry.head_dim)
        keys, values = (torch.randn(shape, dtype=size.dtype, device=device) for _ in range(2))
        lines = _lines(decoding.rows, distinct, prefix, size.own)
        # where each reads it, and there before the clock starts
        work = {name: lines.to(lists_device(name, device)) for name in {backend, "plain"}}

        def attend(
            layer: int, name: str = backend, keys: Any = keys, values: Any = values, work: Any = work
        ) -> torch.Tensor:
            return BACKENDS[name](query, keys[layer], values[layer], work[name], window=0, scale=scale, softcap=0.0)

        def measured(attend: Any = attend, bytes_read: int = keys[0].nbytes * 2) -> dict[str, Any]:
            found, expected = attend(0).float(), attend(0, "plain").float()
            seconds, is_graph = _kernel_seconds(setup.device, attend)
            return {
                "bytes_per_second": round(bytes_read / seconds, 0),
                "share_of_copy_rate": round(bytes_read / seconds / setup.copy_rate, 4),
                "us": round(1e6 * seconds, 2),
                "in_a_graph": is_graph,
                "backend": backend,
                "worst": float((found - expected).abs().max() / expected.abs().max()),
            }

        yield Cell(decoding.rows, prefix, distinct).name, machine.tried(setup.device, measured)


def _kernel_seconds(device: str, attend: Any) -> tuple[float, bool]:
    """Of one call, and whether it was in a CUDA graph, as it must be for launches not to be what is measured."""
    calls = [number % LAYERS for number in range(ATTENDED)]

    def every() -> None:
        for layer in calls:
            attend(layer)

    every()
    run: Any = every
    if device != "cpu":
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                every()
            run = graph.replay
        except RuntimeError:
            machine.wait(device)
    return statistics.median(machine.seconds(device, run) for _ in range(5)) / ATTENDED, run is not every


def _lines(rows: int, distinct: int, prefix: int, own: int) -> torch.Tensor:
    """Rows that decode, neighbours sharing a prefix; prefixes lie before what is the rows' own."""
    first, each = distinct * prefix, rows // distinct
    items = [
        WorkItem(Part.OWN, Mask.FULL, row, row + 1, first + row * own, first + (row + 1) * own, 0, 0)
        for row in range(rows)
    ]
    items += [
        WorkItem(Part.PREFIX, Mask.FULL, each * n, each * (n + 1), n * prefix, (n + 1) * prefix, 0, 0)
        for n in range(distinct)
    ]
    return torch.tensor([item.as_tuple() for item in items])
