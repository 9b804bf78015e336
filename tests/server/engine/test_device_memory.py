from __future__ import annotations

import pytest
import torch

from server.engine import device_memory
from server.engine.device_memory import CudaMemory


class Allocator:
    """torch's on a CUDA device, as far as it is asked: blocks of 2 are reserved, and kept until they are given back."""

    TOTAL, OTHERS = 100, 10

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held = self.reserved = self.peak = 0
        self.waited = 0
        for name in ("mem_get_info", "memory_allocated", "memory_reserved", "max_memory_reserved", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)

    def allocate(self, size: int) -> None:
        self.held += size
        self.reserved = max(self.reserved, self.held + self.held % 2)
        self.peak = max(self.peak, self.reserved)

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return self.TOTAL - self.OTHERS - self.reserved, self.TOTAL

    def memory_allocated(self, device: torch.device) -> int:
        return self.held

    def memory_reserved(self, device: torch.device) -> int:
        return self.reserved

    def max_memory_reserved(self, device: torch.device) -> int:
        return self.peak

    def reset(self, device: torch.device) -> None:
        self.peak = self.reserved

    def synchronize(self, device: torch.device) -> None:
        self.waited += 1

    def empty_cache(self) -> None:
        self.reserved = self.held + self.held % 2


def test_what_torch_keeps_for_later_counts_as_free_and_what_others_have_does_not(monkeypatch):
    allocator, memory = Allocator(monkeypatch), CudaMemory(torch.device("cuda"))
    allocator.allocate(20)
    allocator.allocate(30)
    allocator.held -= 30
    assert (memory.total(), memory.held(), memory.free()) == (100, 20, 70)


def test_the_peak_is_what_work_had_reserved_beyond_what_was_held(monkeypatch):
    allocator, memory = Allocator(monkeypatch), CudaMemory(torch.device("cuda"))
    allocator.allocate(50)
    allocator.held -= 30

    def work() -> None:
        allocator.allocate(15)
        allocator.held -= 15
        allocator.allocate(8)
        allocator.held -= 8

    before = allocator.waited
    assert memory.peak(work) == 16
    assert allocator.waited > before + 1, "kernels may run on after a call has returned"
    assert memory.free() == 70


def test_only_a_device_with_memory_of_its_own_is_asked():
    assert device_memory.of(torch.device("cpu")) is None
    assert isinstance(device_memory.of(torch.device("cuda", 1)), CudaMemory)
