"""A CUDA graph's stand-in: the operators that torch was asked for, played again on the same tensors.

Like a graph it knows nothing of the Python that asked for them. What that decided by a number of the recorded step
stays decided, and a tensor that is not at its place any more is not found. What would make the host wait is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from server.engine import attention

WAITS = {
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::is_nonzero",
    "aten::equal",
    "aten::masked_select",
}


class HostWaits(AssertionError):
    """What was recorded asks the device for a number."""


class Recording(TorchDispatchMode):
    """Notes each operator with its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.name().split(".")[0] in WAITS:
            raise HostWaits(f"{func.name()} makes the host wait")
        if func.name() == "antefix::attend":  # opaque to torch, not to a device: what it does is recorded
            with self:
                return attention._attend(*args, **kwargs)
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.calls.append((func, args, kwargs, made))
        return result

    def play(self) -> None:
        """Runs the operators again, each into the tensors that it made."""
        for func, args, kwargs, made in self.calls:
            again = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]
            for old, new in zip(made, again, strict=True):
                assert old.shape == new.shape, f"{func.name()} gives another shape"
                if old.data_ptr() != new.data_ptr():  # else it looks at what it looked at
                    old.copy_(new)


def record(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """See `step_graphs.Recorder`."""
    with torch.inference_mode(), Recording() as recording:
        result = run()

    @torch.inference_mode()
    def play() -> None:
        recording.play()

    return play, result


def again(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """A recorder whose recordings are run anew."""
    with torch.inference_mode():
        result = run()

    @torch.inference_mode()
    def play() -> None:
        result.copy_(run())

    return play, result
