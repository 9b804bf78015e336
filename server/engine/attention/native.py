"""Attention on the CPU in our own C: all decoding rows of a step in one call, where torch's kernel takes one an item.

Where `native.c` cannot be compiled, or does not compute what `cpu` computes, there is no native backend. Longer
stretches of queries stay with torch's kernel, which multiplies matrices.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from server.engine import compiled
from server.engine.attention import cpu, segments
from server.engine.attention.work import FIELDS, Mask, Part, WorkItem

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "native.c", FOLDER / "native_rows.h")
DTYPES = (torch.float32, torch.bfloat16)
MOST_ROWS = 8  # queries of an item that are done here, one after another
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
) -> torch.Tensor:
    """As `segments.attend`. Raises RuntimeError where `is_available` is false."""
    library = _library()
    if library is None:
        raise RuntimeError("there is no native attention on this machine")
    return _attend(library, query, keys, values, work, window, scale, softcap)


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
) -> torch.Tensor:
    asked, query = query, query.float()  # the same tensor where it is float32 already
    if query.stride(2) != 1:
        query = query.contiguous()
    own, prefix = torch.empty(query.shape), torch.empty(query.shape)
    own_lse, prefix_lse = torch.empty(query.shape[:2]), torch.full(query.shape[:2], -torch.inf)
    threads = torch.get_num_threads()
    failed = library.antefix_attend(
        _at(query), query.stride(0), query.stride(1), _at(keys), _at(values), keys.dtype is torch.bfloat16,
        query.shape[1], *keys.shape[1:],
        scale, softcap, _at(work), len(work), MOST_ROWS, threads, _at(own), _at(own_lse), _at(prefix), _at(prefix_lse),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for attention scores")
    targets = {Part.OWN: (own, own_lse), Part.PREFIX: (prefix, prefix_lse)}
    for item in _left(work):
        segments.fill(targets, cpu.attend_item, asked, keys, values, item, window=window, scale=scale, softcap=softcap)
    library.antefix_merge(
        _at(own), _at(own_lse), _at(prefix), _at(prefix_lse), own_lse.numel(), query.shape[2], threads
    )
    return own.to(asked.dtype)


def _left(work: torch.Tensor) -> list[WorkItem]:
    """What native.c passes over."""
    numbers = work.numpy()  # a view, and numpy picks rows of so small a table in a tenth of torch's time
    rows = numbers[:, FIELDS.index("q_hi")] - numbers[:, FIELDS.index("q_lo")]
    left = numbers[(numbers[:, FIELDS.index("mask")] != Mask.FULL) | (rows > MOST_ROWS)]
    return WorkItem.read(left.tolist())


def _at(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = compiled.library("attention", SOURCES)
    if library is None:
        return None
    number, pointer, real = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
    library.antefix_attend.argtypes = [
        pointer, number, number, pointer, pointer, ctypes.c_int, number, number, number, real, real, pointer, number,
        number, number, *[pointer] * 4,
    ]  # fmt: skip
    library.antefix_merge.argtypes = [*[pointer] * 4, number, number, number]
    return library if _agrees(library) else None


def _agrees(library: ctypes.CDLL) -> bool:
    """Whether it computes what torch's kernel does, on a row with a prefix and a row without."""
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(rows, heads, 64, generator=generator) for rows, heads in ((2, 4), (9, 2), (9, 2))
    )
    items = [WorkItem(Part.OWN, Mask.FULL, row, row + 1, 3 * row, 3 * row + 3, 0, 0) for row in (0, 1)]
    items.append(WorkItem(Part.PREFIX, Mask.FULL, 0, 1, 6, 9, 0, 0))
    work = torch.tensor([item.as_tuple() for item in items])
    expected = segments.attend(cpu.attend_item, query, keys, values, work, window=0, scale=0.1, softcap=0.0)
    return bool((_attend(library, query, keys, values, work, 0, 0.1, 0.0) - expected).abs().max() < TOLERANCE)
