"""Whole steps as CUDA graphs: what a step launches is recorded once for each bucket, and then only played.

A decode step of a small model launches more kernels than its device is busy for; a graph launches them at once. What a
graph reads lies in `StepBuffers`, and the attention's launches depend on shapes alone, so one recording serves every
step that its bucket holds. A step that no bucket holds runs as it would without graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from server.engine.batch import Batch
from server.engine.step_buffers import Bucket, StepBuffers

# Near enough to each other that padding is at most a half, and from 8 on a third. None is 1: torch compiles that apart.
TOKENS = (2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


class Recorder(Protocol):
    """What records, such as `CudaRecorder`."""

    def __call__(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """Records what `run` does to tensors; gives what plays it again, and the tensor that then holds its result."""


@dataclass(frozen=True)
class _Recording:
    buffers: StepBuffers
    play: Callable[[], None]
    logits: torch.Tensor


class StepGraphs:
    """Recordings of `forward`, which gives the logits `[N, V]` of a batch on the device."""

    def __init__(
        self,
        forward: Callable[[Batch], torch.Tensor],
        record: Recorder,
        *,
        windows: Iterable[int],
        spare_slot: int,
        device: torch.device,
        most_tokens: int,
        most_rows: int,
    ) -> None:
        self._recordings: list[_Recording] = []
        # The largest first: smaller ones find room in the memory that it has taken.
        for tokens in sorted((size for size in TOKENS if size <= most_tokens), reverse=True):
            for has_memories in (True, False):
                bucket = Bucket(tokens, min(tokens, most_rows), has_memories)
                buffers = StepBuffers(bucket, windows, spare_slot, device)
                play, logits = record(partial(forward, buffers.batch))
                self._recordings.append(_Recording(buffers, play, logits))
        self._recordings.reverse()

    def run(self, batch: Batch) -> torch.Tensor | None:
        """Logits `[N, V]` of a batch that lies on the host, to be read before the next step; None if none holds it."""
        for recording in self._recordings:
            if recording.buffers.bucket.holds(batch):
                recording.buffers.fill(batch)
                recording.play()
                return recording.logits[: len(batch.selected)]
        return None


class CudaRecorder:
    """Recordings share one memory, for they are played one after another."""

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """What is only done the first time, such as compiling kernels, is done before."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, stream=self._stream):
            result = run()
        return graph.replay, result
