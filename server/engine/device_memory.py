"""What a device with memory of its own says of it. A CPU's is the machine's, and is not asked here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class DeviceMemory(Protocol):
    """All in bytes."""

    def total(self) -> int:
        """All of the device's."""

    def free(self) -> int:
        """What anybody could have now, nothing being kept for later here."""

    def held(self) -> int:
        """What this process's tensors take."""

    def peak(self, work: Callable[[], None]) -> int:
        """The most that work took at a time, beyond what was held before."""

    def release(self) -> None:
        """Gives back what was kept for later."""


class CudaMemory:
    """A CUDA device's, through torch's allocator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def total(self) -> int:
        """All of the device's."""
        return torch.cuda.mem_get_info(self._device)[1]

    def free(self) -> int:
        """What anybody could have now."""
        self.release()
        return torch.cuda.mem_get_info(self._device)[0]

    def held(self) -> int:
        """What this process's tensors take."""
        return torch.cuda.memory_allocated(self._device)

    def peak(self, work: Callable[[], None]) -> int:
        """By what the allocator reserved: what it rounds up, and holes, are taken from others too."""
        self.release()
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_reserved(self._device)
        work()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_reserved(self._device) - before

    def release(self) -> None:
        """Gives back what was kept for later; kernels may still be reading it."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()


def of(device: torch.device) -> DeviceMemory | None:
    """That of a device, or None where it is the machine's."""
    return CudaMemory(device) if device.type == "cuda" else None
