"""Norms and rotations in our own C, one pass each, where transformers takes half a dozen kernels; optional everywhere.

A fused operation takes the place of another only where it gives the same on a sample.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch

from prefix_store.model import modules
from server.engine import compiled

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "fused.c", FOLDER / "fused_rows.h", FOLDER / "bfloat16.h")
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
# Largest difference; half precision is rounded once here, and after each kernel there.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.1}
ROTATE = "apply_rotary_pos_emb"
# What transformers' families call the small number under the root.
EPSILONS = ("variance_epsilon", "eps")

Rotate = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class RMSNorm(torch.nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis (Zhang & Sennrich 2019, arXiv 1910.07467).

    It stands for the layer `plain`.
    """

    def __init__(self, plain: torch.nn.Module, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        modules.keep_plain(self, plain)
        self.scale, self.eps = weight.detach().float().contiguous(), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., E]` to the same."""
        x = x.contiguous()
        output = torch.empty_like(x)
        size = len(self.scale)
        _function("rms_norm", x)(
            x.data_ptr(), self.scale.data_ptr(), output.data_ptr(), x.numel() // size, size, self.eps,
            torch.get_num_threads(),
        )  # fmt: skip
        return output


def fuse(model: torch.nn.Module) -> int:
    """Replaces the model's RMS norms and the rotation within its attentions; returns how many modules changed."""
    like = next(model.parameters())
    if like.device.type != "cpu" or like.dtype not in NAMES or _library() is None:
        return 0
    norms = len(modules.replace(model, lambda layer: _norm(layer, like.dtype)))
    return norms + sum(_turn(layer, like.dtype) for layer in model.modules())


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of `x` `[1, H, T, D]` by `cosine` and `sine` `[1, T, D]` (Su et al. 2021, arXiv 2104.09864).

    The result lies as `[1, T, H, D]`, as what follows reads it.
    """
    _, heads, tokens, size = x.shape
    output = x.new_empty(1, tokens, heads, size)
    _function("rotate", x)(
        x.data_ptr(), x.stride(2), x.stride(1), cosine.data_ptr(), sine.data_ptr(), output.data_ptr(),
        tokens, heads, size, torch.get_num_threads(),
    )  # fmt: skip
    return output.transpose(1, 2)


@torch.inference_mode()
def _norm(layer: Any, dtype: torch.dtype) -> RMSNorm | None:
    """What gives the same as this layer, if it is an RMS norm by its name and by a sample."""
    if type(layer) is RMSNorm or not type(layer).__name__.endswith("RMSNorm"):
        return None
    eps = next((getattr(layer, name) for name in EPSILONS if hasattr(layer, name)), None)
    if eps is None or not isinstance(getattr(layer, "weight", None), torch.Tensor):
        return None
    x = torch.randn(3, len(layer.weight), generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = layer(x).float()
    # Gemma's families keep what the weight is more than one
    for weight in (layer.weight, 1 + layer.weight.float()):
        made = RMSNorm(layer, weight, eps)
        if _is_close(made(x), expected, dtype):
            return made
    return None


def _turn(layer: Any, dtype: torch.dtype) -> bool:
    """Gives an attention its own forward again, in which the rotation alone is another function; true if it did.

    The function that everybody else's models call stays what it is. `modules.make_plain` undoes it.
    """
    forward = type(layer).forward
    if not isinstance(forward, FunctionType) or ROTATE not in forward.__code__.co_names:
        return False
    plain = forward.__globals__.get(ROTATE)
    if not callable(plain) or not _rotates(plain, dtype):
        return False
    names = {**forward.__globals__, ROTATE: functools.partial(_rotate_both, plain)}
    turned = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    turned.__kwdefaults__ = forward.__kwdefaults__
    layer.forward = MethodType(turned, layer)
    return True


def _rotate_both(
    plain: Rotate, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *others: Any, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' `apply_rotary_pos_emb` for what the engine gives it; `plain` is the one that does the rest."""
    # some families rotate the first numbers of a head only
    whole = cos.shape == sin.shape == (1, q.shape[2], q.shape[3]) and len(q) == 1
    dense = cos.is_contiguous() and sin.is_contiguous() and q.stride(3) == k.stride(3) == 1
    if others or options or not whole or not dense or not cos.dtype == sin.dtype == q.dtype == k.dtype:
        return plain(q, k, cos, sin, *others, **options)
    return rotate(q, cos, sin), rotate(k, cos, sin)


@functools.cache
@torch.inference_mode()
def _rotates(plain: Rotate, dtype: torch.dtype) -> bool:
    """Whether this is the rotation of halves that is made here; there are families that rotate neighbours."""
    draws = torch.Generator().manual_seed(0)
    q, k, cos, sin = (
        torch.randn(shape, generator=draws).to(dtype) for shape in ((1, 4, 3, 8), (1, 2, 3, 8), (1, 3, 8), (1, 3, 8))
    )
    try:
        expected = plain(q, k, cos, sin)
    except (RuntimeError, TypeError):
        return False
    return all(_is_close(rotate(x, cos, sin), y.float(), dtype) for x, y in zip((q, k), expected, strict=True))


def _is_close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    return got.shape == expected.shape and bool((got.float() - expected).abs().max() < TOLERANCES[dtype])


def _function(name: str, x: torch.Tensor) -> Callable[..., None]:
    function: Callable[..., None] = getattr(_library(), f"antefix_{name}_{NAMES[x.dtype]}")
    return function


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = compiled.library("fused", SOURCES)
    if library is None:
        return None
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    for name in NAMES.values():
        getattr(library, f"antefix_rms_norm_{name}").argtypes = [*[pointer] * 3, number, number, ctypes.c_float, number]
        getattr(library, f"antefix_rotate_{name}").argtypes = [pointer, number, number, *[pointer] * 3, *[number] * 4]
    return library
