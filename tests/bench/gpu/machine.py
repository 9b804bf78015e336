"""The device: its name, its clock, its memory and how fast it copies; a CPU stands in for one in a small run."""

from __future__ import annotations

import gc
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

COPIES, BEST_OF = 10, 5
LINE = 300  # characters of an error


class DeviceLost(BaseException):
    """Nothing more can be computed in this process."""


def default() -> str:
    """A GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def named(device: str) -> dict[str, Any]:
    """What stands beside every number."""
    if device == "cpu":
        return {"gpu": None}
    properties = torch.cuda.get_device_properties(0)
    return {"gpu": properties.name, "gpu_gb": round(properties.total_memory / 1e9, 1), "cuda": torch.version.cuda}


def wait(device: str) -> None:
    """Until all that was asked for is done."""
    if device != "cpu":
        torch.cuda.synchronize()


def seconds(device: str, work: Callable[[], Any]) -> float:
    """What it takes, until it is done."""
    wait(device)
    begun = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - begun


def copy_rate(device: str, size: int) -> float:
    """Bytes read and written a second by a copy of so many bytes: the median of a few."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copies() -> None:
        for _ in range(COPIES):
            target.copy_(source)

    copies()
    return 2 * COPIES * size / statistics.median(seconds(device, copies) for _ in range(BEST_OF))


def free_bytes(device: str) -> int:
    """Of memory; on a CPU what a small run may have of it."""
    return torch.cuda.mem_get_info()[0] if device != "cpu" else 1 << 30


def total_bytes(device: str) -> int:
    """Of memory, taken or not."""
    return torch.cuda.mem_get_info()[1] if device != "cpu" else 1 << 30


def release(device: str) -> None:
    """Gives back what nobody holds any more."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def tried(device: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the work finds, or what it failed with; whoever asked goes on. Raises DeviceLost where nobody can."""
    try:
        return work()
    except Exception as error:  # out of memory, above all; whatever it is, it is the result
        # an error keeps what the calls below it had made
        traceback.clear_frames(error.__traceback__)
        failed = told(error)
    try:
        wait(device)
        release(device)
    except Exception as error:
        raise DeviceLost(failed) from error
    return {"failed": failed}


def told(error: BaseException) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:LINE]}"
