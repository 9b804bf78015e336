"""Tuning methods that an operator brings along: a Python file each, whose `METHOD` is a `NewMethod`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from trainer.methods.base import NewMethod

ATTRIBUTE = "METHOD"


def load(files: Mapping[str, Path]) -> dict[str, NewMethod]:
    """Runs each file and takes its method. Raises SystemExit with one line that names the file and the reason."""
    return {name: _load(name, path) for name, path in files.items()}


def _load(name: str, path: Path) -> NewMethod:
    if not path.is_file():
        raise _unusable(path, "there is no such file")
    try:
        module = _run(name, path)
    except (Exception, SystemExit) as error:  # whatever the file does wrong is one line to the operator
        raise _unusable(path, f"{type(error).__name__}: {error}") from error
    method: NewMethod | None = getattr(module, ATTRIBUTE, None)
    if not callable(method):
        raise _unusable(path, f"it has no {ATTRIBUTE}, or one that cannot be called")
    return method


def _run(name: str, path: Path) -> ModuleType:
    # a name of its own: a file called json.py must not become everybody's json
    spec = importlib.util.spec_from_file_location(f"antefix_method_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the annotations of a class
    spec.loader.exec_module(module)
    return module


def _unusable(path: Path, reason: str) -> SystemExit:
    return SystemExit(f"antefix worker: ANTEFIX_METHODS: {path}: {' '.join(reason.split())[:500]}")
