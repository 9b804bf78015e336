"""What the one thread does that owns the device: no I/O; requests come in checked, events go out by callback."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from prefix_store.errors import GenerationFailed, OutOfMemory, ShuttingDown
from server.distribution import Reading
from server.engine.engine import Engine
from server.engine.kv_pool import bytes_per_slot
from server.engine.step_meter import StepMeter
from server.scheduler.messages import FinishReason, GenerationRequest, PrefixPayload, TokenEvent
from server.scheduler.plan import StepPlan

EventSink = Callable[[TokenEvent], None]
Preloading = tuple[str, Future[None]]  # a digest, and who waits for it
NONE = Reading((), (0,), 0.0)
FAILED = "the engine failed; the server must be restarted"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for metrics. Counters only grow; `distinct_prefixes` is of the last step.

    `kv_usage`: the share of the KV slots that is taken and cannot be freed by evicting idle prefixes.
    """

    alive: bool
    running: int
    waiting: int
    kv_slots: int
    kv_slots_used: int
    kv_usage: float
    prefixes_resident: int
    prefix_bytes: int
    prefixes_preloaded: int
    distinct_prefixes: int
    steps: int
    prompt_tokens: int
    generated_tokens: int
    prefix_hits: int
    prefix_misses: int
    prefix_evictions: int
    preemptions: int
    shortages: int
    running_of: Mapping[str, int] = field(default_factory=dict)
    waiting_of: Mapping[str, int] = field(default_factory=dict)
    step_rows: Reading = NONE
    step_prefixes: Reading = NONE
    step_tokens: Reading = NONE
    step_seconds: Reading = NONE
    gaps: Reading = NONE
    queue: Reading = NONE
    prefill: Reading = NONE
    decode: Reading = NONE
    loads: Reading = NONE


class EngineLoop:
    """Runs steps while there is work. Every method may be called from any thread.

    The lock guards the scheduler and is free while the model runs, so submitting and aborting never wait for a step.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._scheduler = engine.scheduler
        self._changed = threading.Condition()
        self._sinks: dict[str, EventSink] = {}
        self._aborted: list[str] = []
        self._preloading: list[Preloading] = []
        self._stopping = False
        self._is_doubtful = False  # a step has failed
        self.has_failed = False
        self._meter = StepMeter()
        self._slot_bytes = bytes_per_slot(engine.frozen.geometry, engine.frozen.dtype)
        self._is_running = False
        self._ended = threading.Event()

    def run(self) -> None:
        """Takes the calling thread until `stop`, or until the engine fails, after which `has_failed`."""
        self._is_running = True
        try:
            while self._turn():
                pass
        except Exception:
            # A scheduler that is wrong about its slots, or a device that computes no more, must not go on: end
            # everything with a reason, and say so.
            _log.exception("the engine has stopped")
            with self._changed:
                self._stopping = self.has_failed = True
                lost = list(self._sinks)
            _settle(self._preloading, GenerationFailed(FAILED))
            self._deliver(
                [TokenEvent(name, finish_reason=FinishReason.ERROR, error=GenerationFailed(FAILED)) for name in lost]
            )
        finally:
            self._ended.set()

    def submit(self, request: GenerationRequest, on_event: EventSink) -> None:
        """Queues a request under its id, which must be new.

        `on_event` is called on the thread of `run` and must not block; nothing comes after an event with a finish
        reason. Raises Overloaded, ContextLengthExceeded or InvalidRequest at once.
        """
        seed = request.params.seed if request.params.seed is not None else secrets.randbits(63)
        with self._changed:
            if self._stopping:
                raise ShuttingDown()
            self._scheduler.add(request, seed)
            self._sinks[request.id] = on_event
            self._changed.notify()

    def abort(self, request_id: str) -> None:
        """Ends a request before the next step. Unknown and ended ids are ignored."""
        with self._changed:
            self._aborted.append(request_id)
            self._changed.notify()

    def preload(self, payload: PrefixPayload, holder: Hashable) -> Future[None]:
        """Keeps a prefix on the device for a holder until `release`; the future is done when it is there.

        Raises what `Preloads.add` raises, ShuttingDown, and through the future GenerationFailed or OutOfMemory.
        """
        with self._changed:
            if self._stopping:
                raise ShuttingDown()
            self._scheduler.space.preload(payload, holder)
            there: Future[None] = Future()
            self._preloading.append((payload.digest, there))
            self._changed.notify()
            return there

    def release(self, digest: str, holder: Hashable) -> None:
        """Ends a holder's preload, whether or not there is one."""
        with self._changed:
            self._scheduler.space.release(digest, holder)

    def preloaded(self) -> Mapping[str, frozenset[Hashable]]:
        """Who holds which digest on the device."""
        with self._changed:
            return self._scheduler.space.preloads.holders()

    def stats(self) -> EngineStats:
        """A consistent snapshot."""
        with self._changed:
            scheduler, residency, meter = self._scheduler, self._scheduler.residency, self._meter
            residents, slots = residency.residents(), scheduler.slots
            idle = sum(resident.extent.size for resident in residents if residency.is_idle(resident))
            return EngineStats(
                alive=self.is_alive,
                running=len(scheduler.running),
                waiting=len(scheduler.waiting),
                kv_slots=slots.total,
                kv_slots_used=slots.used,
                kv_usage=(slots.used - idle) / slots.total,
                prefixes_resident=len(residents),
                prefix_bytes=self._slot_bytes * sum(resident.extent.size for resident in residents),
                prefixes_preloaded=len(scheduler.space.preloads),
                distinct_prefixes=meter.distinct_prefixes,
                steps=meter.steps,
                prompt_tokens=meter.prompt_tokens,
                generated_tokens=meter.generated_tokens,
                prefix_hits=residency.hits,
                prefix_misses=residency.misses,
                prefix_evictions=residency.evictions,
                preemptions=scheduler.admission.preemptions,
                shortages=self._engine.shortages,
                running_of=Counter(sequence.request.tenant for sequence in scheduler.running),
                waiting_of={line.tenant: len(line) for line in scheduler.waiting.lines},
                step_rows=meter.rows.read(),
                step_prefixes=meter.prefixes.read(),
                step_tokens=meter.tokens.read(),
                step_seconds=meter.seconds.read(),
                gaps=meter.gaps.read(),
                queue=scheduler.phases.queue.read(),
                prefill=scheduler.phases.prefill.read(),
                decode=scheduler.phases.decode.read(),
                loads=self._engine.loads.read(),
            )

    def stop(self) -> None:
        """Ends `run` after its current step, and every request, as the server is shutting down."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._is_running:
            self._ended.wait()
        with self._changed:
            events = self._scheduler.end_all()
        _settle(self._preloading, ShuttingDown())
        self._deliver(events)

    @property
    def most_waiting(self) -> int:
        """Requests that may wait; more of them at once are never taken."""
        return self._engine.limits.waiting

    @property
    def is_alive(self) -> bool:
        """Whether requests will be answered, once it runs."""
        return not self._stopping

    def _turn(self) -> bool:
        """Waits for work and runs one step; False when told to stop."""
        with self._changed:
            self._changed.wait_for(self._has_work)
            if self._stopping:
                return False
            events = self._end_early()
            plan, preloading = None if self._engine.is_ahead else self._scheduler.schedule(), []
            if not self._scheduler.space.preloads.missing:  # all are in the plan, there, or let go of again
                preloading, self._preloading = self._preloading, []
        self._deliver(events + self._step(plan, preloading))
        if self._is_doubtful:
            self._engine.check()  # it was the request's fault, or the device will not come back
            self._is_doubtful = False
        return True

    def _has_work(self) -> bool:
        scheduler = self._scheduler
        return bool(self._stopping or self._aborted or self._preloading or scheduler.running or scheduler.waiting)

    def _end_early(self) -> list[TokenEvent]:
        """Aborts and deadlines, taken between steps only.

        A step that is being launched reads the slots that this frees. One that was launched before does too, but
        whatever the device is asked for next, it does behind that.
        """
        aborted = [self._scheduler.abort(request_id, FinishReason.ABORT) for request_id in self._aborted]
        self._aborted.clear()
        return [event for event in aborted if event is not None] + self._scheduler.expire()

    def _step(self, plan: StepPlan | None, preloading: list[Preloading]) -> list[TokenEvent]:
        try:
            done = self._engine.advance(plan, self._changed)
        except Exception as error:
            # Whatever it was, these rows cannot go on: their keys and values may be half written.
            _log.exception("a step failed")
            self._is_doubtful = True
            failed = f"the engine failed: {type(error).__name__}"
            _settle(preloading, GenerationFailed(failed))
            with self._changed:
                return self._scheduler.fail_running(failed)
        lost = {load.payload.digest for load in done.lost}
        _settle([one for one in preloading if one[0] in lost], OutOfMemory())
        _settle([one for one in preloading if one[0] not in lost])
        with self._changed:
            self._meter.count(done.plan, done.begun, time.perf_counter())
            return self._engine.commit(done)

    def _deliver(self, events: list[TokenEvent]) -> None:
        for event in events:
            sink = self._sinks.get(event.request_id)
            if event.finish_reason is not None:
                self._sinks.pop(event.request_id, None)
            try:
                if sink is not None:
                    sink(event)
            except Exception:
                # whoever it was for is gone, say a closed event loop; the others are not
                _log.exception("an event could not be delivered")


def _settle(preloading: list[Preloading], error: Exception | None = None) -> None:
    """Tells those that still wait."""
    for _, future in preloading:
        if not future.set_running_or_notify_cancel():
            continue
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
