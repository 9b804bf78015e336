"""One step: plan, run, commit."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

from prefix_store.errors import ModelUnsupported, OutOfMemory
from prefix_store.model import shortage
from prefix_store.model.frozen import FrozenModel
from server.distribution import SHORT_SECONDS, Distribution
from server.engine import device_memory, self_test
from server.engine.attention import ON_DEVICE, native, triton
from server.engine.batch import Batch, Unread, behind, build
from server.engine.encoder_decoder import EncoderDecoderRunner
from server.engine.kv_pool import KVPool, bytes_per_slot, memory_slots
from server.engine.launched import Launched
from server.engine.model_runner import ModelRunner
from server.engine.room import PATIENCE, Room
from server.engine.sampled import Sampled
from server.engine.sampler import sample
from server.engine.step_graphs import CudaRecorder
from server.scheduler.messages import TokenEvent
from server.scheduler.plan import Load, Row, RowResult, StepDone, StepPlan
from server.scheduler.scheduler import Limits, Scheduler

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Engine:
    """The scheduler and the device behind it. One thread runs steps; see `EngineLoop`.

    Takes the model over: its attention is bound to the pool, and its linear layers are rounded to 8-bit integers where
    `int8` asks for it, after a self-test that raises ModelUnsupported.

    `shortages` counts the times that memory ran out. It `runs_ahead` where the device works by itself.
    """

    def __init__(
        self,
        frozen: FrozenModel,
        limits: Limits,
        *,
        backend: str | None = None,
        int8: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.frozen = frozen
        memory, source = memory_slots(frozen.geometry), source_slots(frozen)
        self.limits = replace(limits, memory_slots=memory, source_slots=source)
        self.scheduler = Scheduler(self.limits, frozen.end_ids, clock)
        self.pool = self._pool(limits.slots)
        self._truths = self_test.plain_truths(frozen)
        kind = EncoderDecoderRunner if frozen.is_encoder_decoder else ModelRunner
        self.runner = kind(frozen, self.pool, backend or default_backend(frozen), int8=int8)
        self_test.check(self.runner, self._truths)
        self.loads = Distribution(SHORT_SECONDS)  # bringing a prefix from host memory
        self.shortages = 0
        self.runs_ahead = frozen.device.type == "cuda"
        self._launched: Launched | None = None
        self._pause = 0  # steps with none behind them
        self._batch: Batch | None = None  # the last one
        self._room = Room(limits.step_tokens + source)
        self._memory = device_memory.of(frozen.device)
        self._clock = clock

    def resize(self, slots: int) -> None:
        """Has a pool of so many slots instead, with nothing in it and no steps recorded. Nothing may be in flight."""
        assert not [*self.scheduler.running, *self.scheduler.waiting], "somebody is in flight"
        self.runner.run_eagerly()
        self.limits = replace(self.limits, slots=slots)
        self.scheduler = Scheduler(self.limits, self.frozen.end_ids, self._clock)
        self.pool = self.runner.pool = self._pool(0)  # there may not be room for the old one beside the new one
        self._release()
        self.pool = self.runner.pool = self._pool(slots)

    def record(self, *, compiled: bool = False) -> None:
        """On CUDA, has steps over this pool recorded as graphs, and the model compiled before if asked for.

        Steps are as they were if the graphs do not pass the self-test too, or cannot be had.
        """
        frozen = self.frozen
        if frozen.device.type != "cuda" or self.runner.backend not in ON_DEVICE or frozen.is_encoder_decoder:
            return
        try:
            if compiled:
                self.runner.compile()
            self.runner.record(CudaRecorder(), self.limits)
            self_test.check(self.runner, self._truths)
        except (RuntimeError, ModelUnsupported) as error:
            _log.warning("steps run without CUDA graphs: %s", error)
            self.runner.run_eagerly()

    def check(self) -> None:
        """The self-test once more, into slots that nobody may hold now: raises if the device computes no more."""
        self_test.check(self.runner, self._truths)

    @property
    def is_ahead(self) -> bool:
        """Whether the next step has been launched already, so that no other one is to be planned."""
        return self._launched is not None and self._launched.is_alive

    def step(self) -> list[TokenEvent]:
        """One whole step; no events when there was nothing to run."""
        expired = self.scheduler.expire()
        return expired + self.commit(self.advance(None if self.is_ahead else self.scheduler.schedule()))

    def advance(self, plan: StepPlan | None, lock: AbstractContextManager[Any] | None = None) -> StepDone:
        """Carries a plan out or, if it `is_ahead` and there is none, waits for the step that was launched.

        Where it `runs_ahead` the step behind that is launched before: the device goes on while the host reads. The lock
        is held while the scheduler is asked for it.
        """
        step = self._launched if plan is None else self.launch(plan)
        assert step is not None, "there is no step"
        self._launched = None
        behind = self._launch_behind(step, lock or nullcontext()) if self.runs_ahead else None
        done = step.finish()
        self._launched = behind  # a step that fails takes it along
        return done

    def launch(self, plan: StepPlan) -> Launched:
        """Has the device carry a plan out, as far as there is memory.

        Where it runs out, a prefix is not brought, and rows are computed fewer at a time; a chunk that is too long even
        alone is cut short. Only a row for which there is no memory alone, and with a single token, gets an error.
        Nothing is lost by beginning anew: what a row writes into the pool, it writes once more.
        """
        begun = time.perf_counter()
        lost = []
        for transfer in plan.transfers:
            if not isinstance(transfer, Load):
                self.pool.apply(transfer)
            elif not self._load(transfer):
                lost.append(transfer)
        rows = deque(row for row in plan.rows if not any(load.is_read_by(row.sequence) for load in lost))
        pieces: list[tuple[list[Row], Sampled]] = []
        while rows:
            pieces += self._next(rows)
        carried = StepPlan(plan.transfers, tuple(row for piece, _ in pieces for row in piece))
        return Launched(carried, tuple(sampled for _, sampled in pieces), tuple(lost), begun)

    def commit(self, done: StepDone) -> list[TokenEvent]:
        """Applies what came of a plan."""
        lost = [event for load in done.lost for event in self.scheduler.lose(load)]
        return lost + self.scheduler.commit(done.plan, done.results)

    def compute(self, rows: Sequence[Row], unread: Unread | None = None) -> Sampled:
        """Puts rows through the model together; one result for each. Raises what torch raises where memory runs out.

        `unread`: what the rows of a plan that was made ahead go on with.
        """
        batch = behind(self._batch, rows, unread) if self._batch is not None and unread is not None else None
        if batch is None:
            plan, relative = StepPlan((), tuple(rows)), self.frozen.is_relative
            batch = build(plan, self.runner.windows, relative=relative, unread=unread)
        self._batch = batch
        return sample(self.runner.run(batch), batch.selections)

    def _launch_behind(self, step: Launched, lock: AbstractContextManager[Any]) -> Launched | None:
        """The step that goes on with tokens which nobody has read; None where that cannot be, or there is no memory."""
        unread = step.unread
        if unread is None or self._pause:
            self._pause = max(0, self._pause - 1)
            return None
        with lock:
            plan = self.scheduler.ahead(step.plan)
        if plan is None:
            return None
        begun = time.perf_counter()
        for transfer in plan.transfers:
            self.pool.apply(transfer)
        sampled = self._attempt(lambda: self.compute(plan.rows, unread))
        if sampled is None:
            self._pause = PATIENCE
            return None
        return Launched(plan, (sampled,), (), begun)

    def _next(self, rows: deque[Row]) -> list[tuple[list[Row], Sampled]]:
        """Computes the first of `rows`, as many as there is room for, and takes them away; none if there was not."""
        piece = self._room.take(rows)
        sampled = self._attempt(lambda: self.compute(piece))
        if sampled is not None:
            self._room.note_fit()
            return [(piece, sampled)]
        if len(piece) == 1 and piece[0].count == 1:
            _log.warning("out of memory for a single row, which fails")
            return [(piece, Sampled.known([RowResult(error=OutOfMemory())]))]
        self._room.note_shortage(piece)
        _log.warning("out of memory in a step: at most %d tokens at a time now", self._room.tokens)
        rows.extendleft(reversed(piece))
        return []

    def _load(self, load: Load) -> bool:
        """Brings a prefix; False if there is no memory for that, not even with nothing kept for later."""
        begun = time.perf_counter()
        if not self._attempt(lambda: self._bring(load)) and not self._attempt(lambda: self._bring(load)):
            _log.warning("out of memory for bringing a prefix of %d slots: its requests fail", load.extent.size)
            return False
        self.loads.add(time.perf_counter() - begun)
        return True

    def _bring(self, load: Load) -> bool:
        if load.payload.is_embeds:
            self.runner.prefill(load.payload.tensor, load.extent)
        else:
            self.pool.apply(load)
        return True

    def _attempt(self, work: Callable[[], T]) -> T | None:
        """What comes of some work; None where memory ran out."""
        try:
            return work()
        except Exception as error:
            if not shortage.ran_out(error):
                raise
        # only now is the error gone, and with it what the calls below had made
        self.shortages += 1
        self._release()
        return None

    def _release(self) -> None:
        if self._memory is not None:
            self._memory.release()

    def _pool(self, slots: int) -> KVPool:
        return KVPool(self.frozen.geometry, slots, dtype=self.frozen.dtype, device=self.frozen.device)


def default_backend(frozen: FrozenModel) -> str:
    """The fastest attention backend that this machine has for a model."""
    if frozen.device.type == "cuda":
        available = triton.is_available(frozen.device, frozen.dtype, frozen.geometry.head_dim)
        return "triton" if available else "plain"
    if frozen.device.type != "cpu":
        return "plain"
    return "native" if native.is_available(frozen.dtype) else "cpu"


def choose_slots(frozen: FrozenModel, rows: int, budget_bytes: int) -> int:
    """KV slots for `rows` full contexts and as much again for prefixes, within a memory budget.

    Never below one context beside a memory, without which the longest legal request could not run.
    """
    wanted = 2 * rows * (frozen.context_length + source_slots(frozen))
    affordable = budget_bytes // bytes_per_slot(frozen.geometry, frozen.dtype)
    return max(least_slots(frozen), min(wanted, affordable))


def least_slots(frozen: FrozenModel) -> int:
    """KV slots for one context beside a memory."""
    return frozen.context_length + memory_slots(frozen.geometry) + source_slots(frozen)


def source_slots(frozen: FrozenModel) -> int:
    """KV slots that a request may take beside its answer's context: the longest source, the longest cross prefix."""
    return 2 * frozen.context_length if frozen.is_encoder_decoder else 0
