"""Prefix files for tests."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save

from prefix_store import codec
from prefix_store.formats import peft
from prefix_store.model.frozen import FrozenModel
from prefix_store.prefix import Method, PrefixManifest
from tests.models import random_kv, random_memory


def manifest(frozen: FrozenModel, length: int = 4, **changes: object) -> PrefixManifest:
    fields = {"base_digest": frozen.digest, "position_offset": length, **changes}
    return PrefixManifest(Method.PREFIX, frozen.geometry, length, **fields)


def native(frozen: FrozenModel, length: int = 4, seed: int = 0, **changes: object) -> bytes:
    """A native file that fits the model."""
    return codec.encode(manifest(frozen, length, **changes), {"self.kv": random_kv(frozen, length, seed)})


def adapter(frozen: FrozenModel, length: int = 4, seed: int = 0) -> dict[str, bytes]:
    """A PEFT adapter's files, by name."""
    made = manifest(frozen, length, base_digest=None)
    return peft.write(made, {"self.kv": random_kv(frozen, length, seed)}, frozen.name, sliding_window=False)


def prompt(frozen: FrozenModel, length: int = 4, seed: int = 0) -> bytes:
    """A native file of method prompt that fits the model."""
    import torch

    made = PrefixManifest(Method.PROMPT, frozen.geometry, length, position_offset=length, base_digest=frozen.digest)
    generator = torch.Generator().manual_seed(seed)
    return codec.encode(made, {"embeds": torch.randn(length, frozen.geometry.hidden_size, generator=generator)})


def memory(frozen: FrozenModel, seed: int = 0, feature_map: str = "elu") -> bytes:
    """A native file of method prefix_plus that fits the model."""
    made = PrefixManifest(
        Method.PREFIX_PLUS, frozen.geometry, 0, position_offset=0, base_digest=frozen.digest, feature_map=feature_map
    )
    return codec.encode(made, {"memory": random_memory(frozen, seed)})


def damaged(frozen: FrozenModel) -> dict[str, bytes]:
    """Files that must be refused, by what is wrong with them."""
    import pickle

    import torch

    good = native(frozen)
    nan = random_kv(frozen, 4)
    nan[0, 0, 0, 0, 0] = float("nan")
    header = good[8 : 8 + int.from_bytes(good[:8], "little")]
    return {
        "empty": b"",
        "truncated": good[:-10],
        "with a tail": good + b"x",
        "pickle": pickle.dumps({"self.kv": [1.0]}),
        "zip": b"PK\x03\x04" + good,
        "endless header": (1 << 62).to_bytes(8, "little") + header,
        "nan": save({"self.kv": nan}, {"antefix": _metadata(good)}),
        "other tensors": save({"weight": torch.zeros(3)}, {"antefix": _metadata(good)}),
        "no manifest": save({"self.kv": random_kv(frozen, 4)}),
        "another base model": native(frozen, base_digest="0" * 64),
    }


def _metadata(good: bytes) -> str:
    import json

    length = int.from_bytes(good[:8], "little")
    text: str = json.loads(good[8 : 8 + length])["__metadata__"]["antefix"]
    return text


def write(files: dict[str, bytes], folder: Path) -> Path:
    """Puts an adapter's files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder
