"""Attention on the CPU in our own C: all items of a step in one call, where torch's kernel takes one after another.

Where `native.c` cannot be compiled, or does not compute what `cpu` computes, there is no native backend.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from server.engine import compiled
from server.engine.attention import cpu, segments
from server.engine.attention.work import Mask, Part, WorkItem

FOLDER = Path(__file__).parent
SOURCES = tuple(FOLDER / name for name in ("native.c", "native_rows.h", "native_blocks.h", "../bfloat16.h"))
DTYPES = (torch.float32, torch.bfloat16)
FEW = 8  # queries of an item that go one after another: that reads keys as they lie, and packs nothing
TOLERANCE = 1e-5


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    work: torch.Tensor,
    *,
    window: int,
    scale: float,
    softcap: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `segments.attend`. Raises RuntimeError where `is_available` is false."""
    library = _library()
    if library is None:
        raise RuntimeError("there is no native attention on this machine")
    return _attend(library, query, keys, values, work, window, scale, softcap, bias)


def is_available(dtype: torch.dtype) -> bool:
    """Whether this machine can run it, for keys and values of that dtype."""
    return dtype in DTYPES and _library() is not None


def _attend(
    library: ctypes.CDLL,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    work: torch.Tensor,
    window: int,
    scale: float,
    softcap: float,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    asked, query = query, query.float()  # the same tensor where it is float32 already
    if query.stride(2) != 1:
        query = query.contiguous()
    bias = bias.float().contiguous() if bias is not None else None
    own, prefix = torch.empty(query.shape), torch.empty(query.shape)
    own_lse, prefix_lse = torch.empty(query.shape[:2]), torch.full(query.shape[:2], -torch.inf)
    failed = library.antefix_attend(
        _at(query), query.stride(0), query.stride(1), _at(keys), _at(values), keys.dtype is torch.bfloat16,
        query.shape[1], *keys.shape[1:], window, scale, softcap, _at(bias) if bias is not None else None,
        bias.shape[1] // 2 if bias is not None else 0, _at(work), len(work), len(query), FEW,
        torch.get_num_threads(), _at(own), _at(own_lse), _at(prefix), _at(prefix_lse),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for attention scores")
    return own.to(asked.dtype)


def _at(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = compiled.library("attention", SOURCES)
    if library is None:
        return None
    number, pointer, real = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
    library.antefix_attend.argtypes = [
        pointer, number, number, pointer, pointer, ctypes.c_int, *[number] * 4, real, real, pointer, number,
        pointer, *[number] * 4, *[pointer] * 4,
    ]  # fmt: skip
    return library if _agrees(library) else None


def _agrees(library: ctypes.CDLL) -> bool:
    """Whether it computes what torch's kernel does: a row with a prefix, a row without, and a stretch of rows.

    Without a bias of relative positions and with one.
    """
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(rows, heads, 64, generator=generator) for rows, heads in ((42, 4), (49, 2), (49, 2))
    )
    items = [WorkItem(Part.OWN, Mask.FULL, row, row + 1, 3 * row, 3 * row + 3, 0, 0) for row in (0, 1)]
    items.append(WorkItem(Part.OWN, Mask.WINDOW, 2, 42, 9, 49, 0, 0))
    items.append(WorkItem(Part.PREFIX, Mask.FULL, 0, 1, 6, 9, 0, 0))
    work = torch.tensor([item.as_tuple() for item in items])
    options: dict[str, Any] = {"window": 30, "scale": 0.1, "softcap": 0.0}
    for bias in (None, torch.randn(4, 2 * 5 + 1, generator=generator)):
        expected = segments.attend(cpu.attend_item, query, keys, values, work, **options, bias=bias)
        found = _attend(library, query, keys, values, work, **options, bias=bias)
        if not (found - expected).abs().max() < TOLERANCE:
            return False
    return True
