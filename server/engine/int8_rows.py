"""Rounds rows of activations to 8-bit integers, each by its own scale, and scales their products back.

In one pass each where `int8_rows.c` can be compiled, else in torch's half a dozen. A row that is not finite gets NaN
for its scale, and so for its result: it must be seen to overflow, and no other row with it.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from server.engine import compiled

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "int8_rows.c", FOLDER / "int8_rows.h", FOLDER / "bfloat16.h")
LARGEST = 127
# oneDNN's fast product takes unsigned activations, and takes the zero point out again in integers, exactly.
ZERO_POINT = 128
# Rows that are smaller are zeros.
SMALLEST = 1e-20
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
TOLERANCE = 1e-5


def round_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[T, in]` as uint8 of the same shape and float32 scales `[T]`: `x = scale * (rounded - ZERO_POINT)`, nearly."""
    library = _library()
    if library is None or x.dtype not in NAMES:
        return _round_rows(x)
    return _round_natively(library, x)


def scale_rows(products: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`products * scales + bias` `[T, out]` of that dtype; what goes in is float32."""
    library = _library()
    if library is None or dtype not in NAMES:
        return _scale_rows(products, scales, bias, dtype)
    return _scale_natively(library, products, scales, bias, dtype)


def _round_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.float()
    largest = torch.linalg.vector_norm(x, torch.inf, -1)
    scales = torch.where(largest.isfinite(), largest / LARGEST, torch.nan)
    by = torch.where(scales >= SMALLEST, 1 / scales, 0)  # zero for NaN too
    rounded = (x * by[:, None]).round_().nan_to_num_(0).add_(ZERO_POINT)
    return rounded.to(torch.uint8), scales


def _scale_rows(products: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.addcmul(bias, products, scales[:, None]).to(dtype)


def _round_natively(library: ctypes.CDLL, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.contiguous()
    rounded, scales = torch.empty(x.shape, dtype=torch.uint8), torch.empty(len(x))
    function = getattr(library, f"antefix_round_{NAMES[x.dtype]}")
    function(x.data_ptr(), *x.shape, rounded.data_ptr(), scales.data_ptr(), torch.get_num_threads())
    return rounded, scales


def _scale_natively(
    library: ctypes.CDLL, products: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    output = torch.empty(products.shape, dtype=dtype)
    function = getattr(library, f"antefix_scale_{NAMES[dtype]}")
    function(
        products.data_ptr(), scales.data_ptr(), bias.data_ptr(), *products.shape,
        output.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return output


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = compiled.library("int8_rows", SOURCES)
    if library is None:
        return None
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    for name in NAMES.values():
        getattr(library, f"antefix_round_{name}").argtypes = [pointer, number, number, pointer, pointer, number]
        getattr(library, f"antefix_scale_{name}").argtypes = [*[pointer] * 3, number, number, pointer, number]
    return library if _agrees(library) else None


def _agrees(library: ctypes.CDLL) -> bool:
    """Whether it computes what torch does."""
    generator = torch.Generator().manual_seed(0)
    x, bias = torch.randn(5, 33, generator=generator), torch.randn(33, generator=generator)
    for dtype in NAMES:
        rounded, scales = _round_natively(library, x.to(dtype))
        expected, expected_scales = _round_rows(x.to(dtype))
        if not torch.equal(rounded, expected) or float((scales / expected_scales - 1).abs().max()) > TOLERANCE:
            return False
        widened = rounded.float()
        output = _scale_natively(library, widened, scales, bias, dtype)
        rounding = torch.finfo(dtype).eps
        expected_output = _scale_rows(widened, scales, bias, dtype).float()
        if not torch.allclose(output.float(), expected_output, rtol=2 * rounding, atol=TOLERANCE):
            return False
    return True
