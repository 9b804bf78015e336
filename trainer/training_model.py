"""A frozen model made ready to train on: all rows in one pass over its layers, and no more kept than that needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from prefix_store.errors import ModelUnsupported
from prefix_store.model import activation, apply
from prefix_store.model.apply import PrefixRows
from prefix_store.model.frozen import FrozenModel
from prefix_store.model.memory import Memory
from prefix_store.prefix import Window
from trainer import frozen_linear
from trainer.frozen_linear import FrozenLinear
from trainer.head import Head
from trainer.packed import PackedForward, Row, pack

# What layers may keep for the backward pass; beyond it they keep their inputs alone and run again.
ACTIVATION_BYTES = 4 << 30
# Largest difference over largest value, of logits and of a prefix's gradient.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
PROBE_LENGTHS = (7, 4, 7, 5)
MEASURED_TOKENS = 32


@dataclass(frozen=True)
class TrainingModel(FrozenModel):
    """A frozen model that takes rows packed; `bytes_per_token`: what its layers keep for the backward pass."""

    head: Head
    bytes_per_token: int
    activation_bytes: int

    def hidden(self, rows: Sequence[Row], places: Sequence[Sequence[int]]) -> torch.Tensor:
        """`[C, E]`: what logits come from, at each row's `places`, one row after another."""
        packed = pack(rows, self.device)
        tokens = packed.ids.shape[1]
        recompute = torch.is_grad_enabled() and tokens * self.bytes_per_token > self.activation_bytes
        output = self.model.base_model(
            input_ids=packed.ids,
            position_ids=packed.positions,
            # of a shape that says that it needs no making; the buckets have masks of their own
            attention_mask=torch.zeros(1, 1, 1, 1, dtype=self.dtype, device=self.device),
            use_cache=False,
            prefix=PackedForward(packed.buckets, recompute=recompute),
        )
        wanted = [start + place for start, found in zip(packed.starts, places, strict=True) for place in found]
        states: torch.Tensor = output.last_hidden_state[0, torch.tensor(wanted, dtype=torch.long, device=self.device)]
        return states


def attach(frozen: FrozenModel, *, activation_bytes: int = ACTIVATION_BYTES) -> FrozenModel:
    """The frozen model as a TrainingModel where a probe shows that it gives what the reference gives.

    Any other is left as `apply.attach` makes it. Raises what that raises.
    """
    if isinstance(frozen, TrainingModel):
        return frozen
    frozen = apply.attach(frozen)
    if frozen.is_encoder_decoder:
        return frozen
    probe = _Probe.of(frozen)
    expected = probe.plain(frozen)
    if not _agrees(_packed(frozen), probe, expected):
        return frozen
    activation.fuse(frozen.model)
    replaced = frozen_linear.replace(frozen.model)
    if isinstance(head := frozen.model.get_output_embeddings(), FrozenLinear):
        head.lay_out()
    ready = _packed(frozen)
    if not _agrees(ready, probe, expected):
        for parent, name, child in replaced:
            setattr(parent, name, child)
        return frozen
    _let_layers_run_again(frozen)
    return dataclasses.replace(ready, bytes_per_token=_bytes_per_token(ready), activation_bytes=activation_bytes)


def _packed(frozen: FrozenModel) -> TrainingModel:
    return TrainingModel(**vars(frozen), head=Head(frozen.model), bytes_per_token=0, activation_bytes=0)


@dataclass(frozen=True)
class _Probe:
    """Rows of every kind: behind a KV prefix, behind a memory, behind a shorter prefix, and of the bare model."""

    ids: tuple[tuple[int, ...], ...]
    kv: torch.Tensor
    prefixes: PrefixRows

    @classmethod
    def of(cls, frozen: FrozenModel) -> _Probe:
        generator, geometry = torch.Generator().manual_seed(0), frozen.geometry
        layers, two, heads, dim = geometry.kv_shape
        ids = torch.randint(frozen.vocabulary_size, (sum(PROBE_LENGTHS),), generator=generator)
        kv = torch.randn(layers, two, heads, 3, dim, generator=generator).to(frozen.device).requires_grad_()
        matrices = torch.randn(layers, geometry.query_heads, dim, dim, generator=generator).to(frozen.device)
        prefixes = PrefixRows.stack(
            [kv, kv[:, :, :, :0], kv[:, :, :, :2], kv[:, :, :, :0]],
            [3, 0, 2, 0],
            [Window.SLIDES, Window.ALWAYS, Window.ALWAYS, Window.ALWAYS],
            [None, Memory(0.1 * matrices, "elu"), None, None],
        )
        return cls(tuple(tuple(row.tolist()) for row in ids.split(PROBE_LENGTHS)), kv, prefixes)

    @torch.enable_grad()
    def plain(self, frozen: FrozenModel) -> list[torch.Tensor]:
        """Logits `[T, V]` by the reference, and the gradient of `kv`."""
        shape = len(self.ids), max(PROBE_LENGTHS)
        ids, real = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        for row, own in enumerate(self.ids):
            ids[row, : len(own)], real[row, : len(own)] = torch.tensor(own), 1
        ids, real = ids.to(frozen.device), real.to(frozen.device)
        return self._with_gradient(apply.logits(frozen, ids, real, self.prefixes)[real.bool()])

    def packed(self, model: TrainingModel) -> list[torch.Tensor]:
        """The same in one pass."""
        last = len(self.ids) - 1
        rows = [Row(ids, self.prefixes if row < last else None, row) for row, ids in enumerate(self.ids)]
        return self._with_gradient(model.head(model.hidden(rows, [range(len(ids)) for ids in self.ids])))

    def _with_gradient(self, logits: torch.Tensor) -> list[torch.Tensor]:
        return [logits.detach(), *torch.autograd.grad(logits.float().logsumexp(-1).sum(), self.kv, retain_graph=True)]


@torch.enable_grad()
def _agrees(model: TrainingModel, probe: _Probe, expected: Sequence[torch.Tensor]) -> bool:
    try:
        found = probe.packed(model)
    except (ModelUnsupported, TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError):
        return False
    return all(_is_close(*pair, TOLERANCES[model.dtype]) for pair in zip(found, expected, strict=True))


def _is_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    if found.shape != expected.shape:
        return False
    difference = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
    return bool(difference <= tolerance)


def _let_layers_run_again(frozen: FrozenModel) -> None:
    """Gradient checkpointing (Chen et al., arXiv 1604.06174) for whoever asks for it, layer by layer."""
    for layer in _layers(frozen):
        layer.forward = partial(_run, layer.forward)


def _run(forward: Any, *inputs: Any, **options: Any) -> Any:
    if isinstance(found := options.get("prefix"), PackedForward) and found.recompute:
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **options)
    return forward(*inputs, **options)


def _layers(frozen: FrozenModel) -> list[Any]:
    count = frozen.geometry.layers
    lists = [module for module in frozen.model.modules() if isinstance(module, torch.nn.ModuleList)]
    return next((list(found) for found in lists if len(found) == count), [])


@torch.enable_grad()
def _bytes_per_token(model: TrainingModel) -> int:
    """Measured on a short row, without what a loss adds."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.model.parameters()}
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    layers, two, heads, dim = model.geometry.kv_shape
    kv = torch.zeros(layers, two, heads, 1, dim, device=model.device, requires_grad=True)
    row = Row((0,) * MEASURED_TOKENS, PrefixRows.shared(kv, 1, 1, Window.ALWAYS), 0)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.hidden([row], [range(1)])
    return sum(sizes.values()) // MEASURED_TOKENS
