"""One step: plan, run, commit."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace

from prefix_store.errors import ModelUnsupported
from prefix_store.model.frozen import FrozenModel
from server.distribution import SHORT_SECONDS, Distribution
from server.engine import self_test
from server.engine.attention import ON_DEVICE, native, triton
from server.engine.batch import build
from server.engine.encoder_decoder import EncoderDecoderRunner
from server.engine.kv_pool import KVPool, bytes_per_slot, memory_slots
from server.engine.model_runner import ModelRunner
from server.engine.sampler import sample
from server.engine.step_graphs import CudaRecorder
from server.scheduler.messages import TokenEvent
from server.scheduler.plan import Load, RowResult, StepPlan
from server.scheduler.scheduler import Limits, Scheduler

_log = logging.getLogger(__name__)


class Engine:
    """The scheduler and the device behind it. One thread runs steps; see `EngineLoop`.

    Takes the model over: its attention is bound to the pool, and its linear layers are rounded to 8-bit integers where
    `int8` asks for it, after a self-test that raises ModelUnsupported. On CUDA its steps are recorded as graphs, and
    compiled before if asked for.
    """

    def __init__(
        self,
        frozen: FrozenModel,
        limits: Limits,
        *,
        backend: str | None = None,
        int8: bool = False,
        compiled: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.frozen = frozen
        memory, source = memory_slots(frozen.geometry), source_slots(frozen)
        self.limits = replace(limits, memory_slots=memory, source_slots=source)
        self.scheduler = Scheduler(self.limits, frozen.end_ids, clock)
        self.pool = KVPool(frozen.geometry, limits.slots, dtype=frozen.dtype, device=frozen.device)
        truths = self_test.plain_truths(frozen)
        kind = EncoderDecoderRunner if frozen.is_encoder_decoder else ModelRunner
        self.runner = kind(frozen, self.pool, backend or default_backend(frozen), int8=int8)
        self_test.check(self.runner, truths)
        if frozen.device.type == "cuda" and self.runner.backend in ON_DEVICE and not frozen.is_encoder_decoder:
            self._record(truths, compiled)
        self.loads = Distribution(SHORT_SECONDS)  # bringing a prefix from host memory

    def step(self) -> list[TokenEvent]:
        """One whole step; no events when there was nothing to run."""
        expired = self.scheduler.expire()
        plan = self.scheduler.schedule()
        return expired + self.scheduler.commit(plan, self.run(plan))

    def run(self, plan: StepPlan) -> list[RowResult]:
        """Carries out a plan on the device; one result for each of its rows."""
        for transfer in plan.transfers:
            if isinstance(transfer, Load):
                self._load(transfer)
            else:
                self.pool.apply(transfer)
        if not plan.rows:
            return []
        batch = build(plan, self.runner.windows, relative=self.frozen.is_relative)
        return sample(self.runner.run(batch), batch.selections)

    def _record(self, truths: list[self_test.Truth], compiled: bool) -> None:
        """Steps as graphs, if these pass the self-test too; what is not recorded is served all the same."""
        try:
            if compiled:
                self.runner.compile()
            self.runner.record(CudaRecorder(), self.limits)
            self_test.check(self.runner, truths)
        except (RuntimeError, ModelUnsupported) as error:
            _log.warning("steps run without CUDA graphs: %s", error)
            self.runner.run_eagerly()

    def _load(self, load: Load) -> None:
        begun = time.perf_counter()
        if load.payload.is_embeds:
            self.runner.prefill(load.payload.tensor, load.extent)
        else:
            self.pool.apply(load)
        self.loads.add(time.perf_counter() - begun)


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
    least = frozen.context_length + memory_slots(frozen.geometry) + source_slots(frozen)
    return max(least, min(wanted, affordable))


def source_slots(frozen: FrozenModel) -> int:
    """KV slots that a request may take beside its answer's context: the longest source, the longest cross prefix."""
    return 2 * frozen.context_length if frozen.is_encoder_decoder else 0
