"""The engine driven by hand, step after step on this thread, with what each step took; or by its loop."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from prefix_store.model.frozen import FrozenModel
from server.engine.engine import Engine
from server.engine.loop import EngineLoop
from server.scheduler.messages import FinishReason, GenerationRequest, TokenEvent
from server.scheduler.scheduler import Limits

Tokens = list[list[int]]
T = TypeVar("T")


def engine_of(frozen: FrozenModel, *, slots: int, backend: str | None = None, **limits: int) -> Engine:
    """An engine with the server's own defaults, where nothing else is said."""
    numbers = {"rows": 64, "step_tokens": 512, "context_length": frozen.context_length, "waiting": 1024, **limits}
    return Engine(frozen, Limits(slots=slots, **numbers), backend=backend)


def submit(engine: Engine, requests: Iterable[GenerationRequest]) -> None:
    """Queues them in order."""
    for request in requests:
        engine.scheduler.add(request, seed=0)


def is_busy(engine: Engine) -> bool:
    """Whether there is anything to run."""
    return bool(engine.scheduler.running or engine.scheduler.waiting)


def drain(engine: Engine, requests: list[GenerationRequest]) -> Tokens:
    """Runs requests, whose names are their numbers, to their ends; every request's tokens, in order."""
    submit(engine, requests)
    tokens: Tokens = [[] for _ in requests]
    while is_busy(engine):
        for event in engine.step():
            assert event.error is None, event.error
            tokens[int(event.request_id)].extend(event.token_ids)
    return tokens


def timed_step(engine: Engine) -> tuple[float, list[TokenEvent]]:
    """One step: its seconds and its events."""
    begun = time.perf_counter()
    events = engine.step()
    return time.perf_counter() - begun, events


def is_decoding(engine: Engine) -> bool:
    """Whether every row is past its prompt and nobody waits."""
    scheduler = engine.scheduler
    return not scheduler.waiting and all(sequence.remaining == 1 for sequence in scheduler.running)


def decode_seconds(engine: Engine, requests: list[GenerationRequest], steps: int, warm: int = 3) -> float:
    """Median seconds of a step in which all requests decode; they are ended afterwards, and their prefixes stay.

    Each must ask for more than `steps + warm` tokens.
    """
    submit(engine, requests)
    while not is_decoding(engine):
        engine.step()
    for _ in range(warm):
        engine.step()
    found = [timed_step(engine)[0] for _ in range(steps)]
    assert len(engine.scheduler.running) == len(requests), "a request ended before it was measured"
    for request in requests:
        engine.scheduler.abort(request.id, FinishReason.ABORT)
    return statistics.median(found)


def dtype_name(dtype: torch.dtype) -> str:
    """float32, bfloat16."""
    return str(dtype).removeprefix("torch.")


def beside(engine: Engine, work: Callable[[EngineLoop], T]) -> T:
    """`work` in a thread beside the engine's loop, which has this one, the only one that computes, as in a server."""
    loop = EngineLoop(engine)

    def run() -> T:
        torch.set_num_threads(1)
        try:
            return work(loop)
        finally:
            loop.stop()

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(run)
        loop.run()
        return found.result()
