"""Between the host and the device without waiting: the host goes on, and what it asked for comes in order."""

from __future__ import annotations

import torch


def bring(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on the device; the same one where that is the host."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Mark:
    """How much the device has been asked for so far."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Until the device has done that; what it is asked for afterwards is not waited for."""
        if self._event is not None:
            self._event.synchronize()


class Readback:
    """A tensor of the device on its way to the host, behind all that the device has been asked for so far."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        if tensor.device.type == "cuda":
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
        self._is_there = Mark(tensor.device)

    def wait(self) -> torch.Tensor:
        """The tensor on the host."""
        self._is_there.wait()
        return self._tensor.cpu()
