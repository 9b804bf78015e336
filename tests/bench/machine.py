"""What this machine could do with a workload at best: multiply by all weights, and read all keys and values.

The limit counts the linear layers at the rate that oneDNN reaches on them and the memory traffic of keys and values at
the rate of plain reads. Nothing else: no activations, no sampling, no Python.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prefix_store.geometry import ModelGeometry
from server.engine.kv_pool import bytes_per_slot
from server.engine.linear import PackedLinear
from tests.bench.workload import Item, Workload

BEST_OF = 20
READ_BYTES = 1 << 30
# Tokens of a step that holds prompts only: the server's default.
PROMPT_TOKENS = 512

Multiply = Callable[[torch.Tensor], torch.Tensor]


def limit(
    model: PreTrainedModel,
    geometry: ModelGeometry,
    workload: Workload,
    items: Sequence[Item],
    *,
    best_of: int = BEST_OF,
) -> dict[str, float]:
    """New tokens per second of a workload when nothing is lost, and what that is made of."""
    layers = [layer for layer in model.modules() if type(layer) in (torch.nn.Linear, Conv1D)]
    head = model.get_output_embeddings()
    rows, rate = len(items), read_rate(best_of=best_of)
    decode, first = product_seconds(layers, rows, best_of), product_seconds([head], rows, best_of)
    # a run of these takes half a second, in which the machine has shown what it can do
    prefill = product_seconds([layer for layer in layers if layer is not head], PROMPT_TOKENS, max(1, best_of // 4))
    prompts = sum(len(item.prompt) for item in items) / PROMPT_TOKENS
    # every prompt's last position goes through the head, for the first new token
    products = prompts * prefill + first + (workload.new_tokens - 1) * decode
    reads = slots_read(workload, items) * bytes_per_slot(geometry, model.dtype) / rate
    return {
        "read_gb_per_second": round(rate / 1e9, 1),
        "gflops_per_second": round(2 * rows * sum(_size(layer) for layer in layers) / decode / 1e9, 1),
        "products_seconds": round(products, 3),
        "reads_seconds": round(reads, 3),
        "tokens_per_second": round(len(items) * workload.new_tokens / (products + reads), 1),
    }


def slots_read(workload: Workload, items: Sequence[Item]) -> int:
    """Slots whose keys and values decoding must read: every row's own in every step, a shared prefix once a step."""
    prefixes = len({item.prefix for item in items}) * workload.virtual_tokens
    # the first token comes of the prompt's own step
    own = sum(len(item.prompt) + step for item in items for step in range(1, workload.new_tokens))
    return own + prefixes * (workload.new_tokens - 1)


def product_seconds(layers: Sequence[Any], rows: int, best_of: int) -> float:
    """All the layers' products in sequence, so that no weights stay in cache: the best run of the best kernel."""
    plain = [_plain(layer) for layer in layers]
    found = [_best(plain, layers, rows, best_of)]
    try:
        packed: list[Multiply] = [PackedLinear(_weight(layer), layer.bias) for layer in layers]
        found.append(_best(packed, layers, rows, best_of))
    except (RuntimeError, AttributeError, NotImplementedError):
        pass  # this build of torch packs nothing
    return min(found)


@torch.inference_mode()
def read_rate(size: int = READ_BYTES, best_of: int = BEST_OF) -> float:
    """Bytes per second of the best read of that many bytes, by the faster of two kernels that only read."""
    columns = 4096
    matrix = torch.ones(size // 4 // columns, columns)
    vector = torch.ones(columns)
    kernels: list[Callable[[], Any]] = [lambda: torch.mv(matrix, vector), matrix.sum]
    return matrix.nbytes / min(_seconds(kernel) for kernel in kernels for _ in range(best_of))


@torch.inference_mode()
def _best(multiply: Sequence[Multiply], layers: Sequence[Any], rows: int, best_of: int) -> float:
    inputs = [torch.randn(rows, _weight(layer).shape[1], dtype=_weight(layer).dtype) for layer in layers]

    def all_products() -> None:
        for layer, x in zip(multiply, inputs, strict=True):
            layer(x)

    return min(_seconds(all_products) for _ in range(best_of))


def _seconds(run: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def _plain(layer: Any) -> Multiply:
    weight, bias = _weight(layer).contiguous(), layer.bias
    return lambda x: functional.linear(x, weight, bias)


def _weight(layer: Any) -> torch.Tensor:
    """`[out, in]`; GPT-2's Conv1D keeps the transpose."""
    weight: torch.Tensor = layer.weight.detach()
    return weight.t() if isinstance(layer, Conv1D) else weight


def _size(layer: Any) -> int:
    return int(layer.weight.numel())
