"""Li & Liang's GPT-2 checkpoints (XiangLi1999/PrefixTuning): the embeddings and the MLP that a prefix came out of.

`wte.weight` is `[P, E]`; `control_trans.0`, `.2` and in the deep variant `.4` are linear layers with tanh between
them, the last of which gives a row of the flat layout. Once trained, the prefix is what the MLP makes of the
embeddings: it is evaluated here, in float32, and not kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from prefix_store.errors import InvalidPrefix, PrefixMismatch
from prefix_store.formats import flat
from prefix_store.geometry import ModelGeometry
from prefix_store.prefix import PrefixManifest
from prefix_store.tensors import PrefixTensors

EMBEDDING = "wte.weight"
LAYERS = ("control_trans.0", "control_trans.2", "control_trans.4")
FEWEST = 2
# what only the authors' BART models have: prefixes of the encoder and of cross-attention
_ENCODER_DECODER = ("wte_enc.weight", "control_trans_enc.0.weight", "control_trans2.0.weight")


def read(state: Mapping[str, torch.Tensor], geometry: ModelGeometry) -> tuple[PrefixManifest, PrefixTensors]:
    """The prefix in a checkpoint's state dict. Raises InvalidPrefix, PrefixMismatch."""
    layers = _layers(state)
    hidden = state[EMBEDDING].float()
    if hidden.dim() != 2 or hidden.shape[1] != geometry.hidden_size:
        raise PrefixMismatch(
            f"{EMBEDDING}: expected shape [virtual tokens, {geometry.hidden_size}], got {list(hidden.shape)}",
            param="file",
        )
    for index, layer in enumerate(layers):
        weight, bias = state[f"{layer}.weight"].float(), state[f"{layer}.bias"].float()
        if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or bias.shape != weight.shape[:1]:
            raise InvalidPrefix(
                f"{layer}: expected a layer of {hidden.shape[1]} inputs, "
                f"got weight {list(weight.shape)} and bias {list(bias.shape)}",
                param="file",
            )
        hidden = torch.nn.functional.linear(hidden.tanh() if index else hidden, weight, bias)
    return flat.read(hidden, geometry, layers[-1])


def _layers(state: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """The names of the MLP's layers, which are all there is beside the embeddings."""
    if any(name in state for name in _ENCODER_DECODER):
        raise PrefixMismatch("a checkpoint of an encoder-decoder model; expected one of GPT-2", param="file")
    for count in range(FEWEST, len(LAYERS) + 1):
        layers = LAYERS[:count]
        if set(state) == {EMBEDDING, *(f"{layer}.{part}" for layer in layers for part in ("weight", "bias"))}:
            return layers
    raise InvalidPrefix(
        f"expected {EMBEDDING} and the weight and bias of {' and '.join(LAYERS[:FEWEST])}, "
        f"got {sorted(name[:40] for name in state)[:8]}",
        param="file",
    )
