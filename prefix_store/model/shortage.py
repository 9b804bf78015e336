"""How torch and its drivers say that there is no more memory."""

from __future__ import annotations

import torch

# What else than an error's type says so: torch's allocator on a CPU, a CUDA driver, and its linear algebra.
PHRASES = ("DefaultCPUAllocator", "out of memory", "STATUS_ALLOC_FAILED")


def ran_out(error: BaseException) -> bool:
    """Whether there was no more memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in PHRASES)
    )
