"""What comparisons of ways to tune a model have in common: runs that are kept, and our own training, timed."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefix_store.jobs import TrainingSpec
from prefix_store.model.frozen import FrozenModel
from tests.judging import nats_per_token
from tests.prove.paper import baselines
from trainer.data import Example, batches
from trainer.loop import fit


def kept_run(folder: Path, label: str, what: dict[str, Any], module: str, *arguments: str) -> dict[str, Any]:
    """What a module prints last of one run, made in a process of its own; it is kept under all that decides it."""
    name = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"{label}-{what['arm'].replace(' ', '_')}-{name}.json"
    if not path.exists():
        command = [sys.executable, "-m", module, *arguments, json.dumps(what)]
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".new").write_text(answer.splitlines()[-1])
        path.with_suffix(".new").replace(path)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def timed_fit(
    frozen: FrozenModel, method: Any, train: Sequence[Example], dev: Sequence[Example], spec: TrainingSpec
) -> tuple[Any, float]:
    """What training gives, and its seconds without those of looking at `dev`."""
    looks: list[float] = []

    def validate() -> float:
        begun = time.perf_counter()
        found = nats_per_token(frozen, method.rows, batches(dev, baselines.WRITTEN))
        looks.append(time.perf_counter() - begun)
        return found

    begun = time.perf_counter()
    result = fit(frozen, method, train, spec, validate=validate)
    return result, time.perf_counter() - begun - sum(looks)
