"""rinna's prefixes (rinnakk/prefix-tuning-gpt): one bare flat tensor `[P, 2*L*Hkv*D]`, all its file says.

It is what the MLP of their training script gave for its P inputs; the MLP is not kept. The script's models, GPT-2 and
GPT-NeoX, have as many KV heads as heads, and real tokens were trained to start at position P.
"""

from __future__ import annotations

import torch

from prefix_store.formats import flat
from prefix_store.geometry import ModelGeometry
from prefix_store.prefix import PrefixManifest
from prefix_store.tensors import PrefixTensors


def read(tensor: torch.Tensor, geometry: ModelGeometry) -> tuple[PrefixManifest, PrefixTensors]:
    """The prefix for a model of the given geometry. Raises InvalidPrefix, PrefixMismatch."""
    return flat.read(tensor, geometry, "the prefix")
