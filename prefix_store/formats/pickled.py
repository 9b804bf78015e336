"""Prefixes in pickle files, for the command line alone: the one module that unpickles anything.

Opening a pickle can run its code, so torch opens these with `weights_only`, which knows tensors and their containers
and refuses everything else. Neither the server nor the trainer may import this module.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch.nn import ParameterList

from prefix_store.errors import InvalidPrefix
from prefix_store.formats import cartridges, li_liang, peft, rinna
from prefix_store.geometry import ModelGeometry
from prefix_store.prefix import PrefixManifest
from prefix_store.tensors import DTYPES, PrefixTensors

AUTO = "auto"
PEFT_FILE = "adapter_model.bin"
MAX_FILE = 2 << 30  # bytes; an MLP of Li & Liang's for GPT-2 XL has a quarter of it
MAX_NAMES = 1024

Content = torch.Tensor | dict[str, torch.Tensor | list[torch.Tensor]]
Prefix = tuple[PrefixManifest, PrefixTensors]


def read(path: Path, kind: str, geometry: ModelGeometry) -> Prefix:
    """The prefix in a file, or in the folder of a PEFT adapter, for a model of the given geometry.

    `kind` is a key of READERS, or AUTO to go by what the file holds. Raises InvalidPrefix for what is damaged, unsafe
    or of no known kind, PrefixMismatch for what does not fit the model.
    """
    file, config = _files(path)
    content = load(file)
    return READERS[_kind_of(content) if kind == AUTO else kind](content, config, geometry)


def load(path: Path) -> Content:
    """What a pickle of tensors holds: finite, detached, on the CPU. Raises InvalidPrefix."""
    try:
        _check_size(path)
        with torch.serialization.safe_globals([ParameterList]):
            found = torch.load(path, map_location="cpu", weights_only=True)
        return _content(found)
    except InvalidPrefix:
        raise
    except UnpicklingError:
        raise _refused("not plain tensors: opening this pickle could run its code, so it is not opened") from None
    except Exception as error:  # torch fails in a dozen ways on a damaged file
        raise _refused(
            f"not a file that torch.save wrote, or a damaged one ({type(error).__name__}: {str(error)[:200]})"
        ) from None


def _files(path: Path) -> tuple[Path, bytes | None]:
    """The pickle, and the PEFT config beside it if there is one."""
    file = path / PEFT_FILE if path.is_dir() else path
    if not file.is_file():
        raise _refused(f"{path.name}: expected a file, or a folder with {PEFT_FILE}")
    config = file.with_name(peft.CONFIG_FILE)
    if not config.is_file():
        return file, None
    with config.open("rb") as opened:
        return file, opened.read(peft.MAX_CONFIG + 1)


def _check_size(path: Path) -> None:
    size = path.stat().st_size
    if zipfile.is_zipfile(path):  # torch unpacks what is compressed
        with zipfile.ZipFile(path) as archive:
            size = max(size, sum(entry.file_size for entry in archive.infolist()))
    if size > MAX_FILE:
        raise _refused(f"expected at most {MAX_FILE} bytes, got {size}")


def _content(found: Any) -> Content:
    if isinstance(found, torch.Tensor):
        return _sound(found, "the tensor")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise _refused(f"expected a tensor or tensors by name, got {type(found).__name__}")
    if len(found) > MAX_NAMES:
        raise _refused(f"expected at most {MAX_NAMES} names, got {len(found)}")
    return {name: _entry(value, name[:40]) for name, value in found.items()}


def _entry(value: Any, name: str) -> torch.Tensor | list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return _sound(value, name)
    if isinstance(value, ParameterList):
        # not by its own methods: what they count on came with the file
        value = list(value._parameters.values())
    if not isinstance(value, list) or len(value) > MAX_NAMES:
        raise _refused(f"{name}: expected a tensor or a list of tensors, got {type(value).__name__}")
    return [_sound(item, name) for item in value]


def _sound(tensor: Any, name: str) -> torch.Tensor:
    """The tensor, once its numbers are all there and finite. A view can claim more of them than its file has."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or tensor.device.type != "cpu":
        raise _refused(f"{name}: expected a plain tensor")
    if tensor.dtype not in DTYPES:
        raise _refused(f"{name}: expected float32, float16 or bfloat16, got {tensor.dtype}")
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise _refused(f"{name}: shape {list(tensor.shape)} claims more numbers than the file has")
    if not bool(tensor.isfinite().all()):
        raise _refused(f"{name}: every value must be finite")
    return tensor.detach()


def _kind_of(content: Content) -> str:
    if isinstance(content, torch.Tensor):
        return "rinna"
    if cartridges.LISTS & set(content):
        return "cartridge"
    if li_liang.EMBEDDINGS & set(content):
        return "li-liang"
    if len(content) == 1:
        return "peft-bin"
    raise _refused(f"none of {', '.join(READERS)}: it holds {sorted(name[:40] for name in content)[:8]}")


def _peft_bin(content: Content, config: bytes | None, geometry: ModelGeometry) -> Prefix:
    """There is one tensor, so its name does not matter."""
    tensors = _by_name(content)
    if len(tensors) != 1:
        raise _refused(f"expected the one tensor {peft.TENSOR!r}, got {sorted(name[:40] for name in tensors)[:8]}")
    return peft.read_tensor(config, next(iter(tensors.values())), geometry)


def _rinna(content: Content, config: bytes | None, geometry: ModelGeometry) -> Prefix:
    if not isinstance(content, torch.Tensor):
        raise _refused(f"expected one bare tensor, got {sorted(name[:40] for name in content)[:8]}")
    return rinna.read(content, geometry)


def _li_liang(content: Content, config: bytes | None, geometry: ModelGeometry) -> Prefix:
    return li_liang.read(_by_name(content), geometry)


def _cartridge(content: Content, config: bytes | None, geometry: ModelGeometry) -> Prefix:
    if isinstance(content, torch.Tensor):
        raise _refused("expected lists of tensors by name, got one tensor")
    lists = {name: value for name, value in content.items() if isinstance(value, list)}
    if len(lists) != len(content):
        raise _refused(f"expected lists of tensors, got a tensor as {sorted(set(content) - set(lists))[0][:40]!r}")
    return cartridges.read(lists, geometry)


def _by_name(content: Content) -> dict[str, torch.Tensor]:
    if isinstance(content, torch.Tensor):
        raise _refused("expected tensors by name, got one tensor")
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if len(tensors) != len(content):
        raise _refused(f"expected tensors, got a list as {sorted(set(content) - set(tensors))[0][:40]!r}")
    return tensors


def _refused(message: str) -> InvalidPrefix:
    return InvalidPrefix(message, param="file")


READERS: dict[str, Callable[[Content, bytes | None, ModelGeometry], Prefix]] = {
    "peft-bin": _peft_bin,
    "rinna": _rinna,
    "li-liang": _li_liang,
    "cartridge": _cartridge,
}
