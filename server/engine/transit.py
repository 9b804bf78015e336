"""Between the host and the device without waiting: the host goes on, and what it asked for comes in order."""

from __future__ import annotations

import torch


def bring(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on the device; the same one where that is the host."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Readback:
    """A tensor of the device on its way to the host, behind all that the device has been asked for so far."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._is_there: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._is_there = torch.cuda.Event()
            self._is_there.record()

    def wait(self) -> torch.Tensor:
        """The tensor on the host; what the device is asked for after the readback is not waited for."""
        if self._is_there is not None:
            self._is_there.synchronize()
        return self._tensor.cpu()
