"""Results as files: one JSON a section, with everything needed to judge a number."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parents[2] / "docs" / "results"
PACKAGES = ("torch", "transformers", "peft")


def conditions() -> dict[str, Any]:
    """Where and with what a measurement was made."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return {
        "commit": commit.stdout.strip() + ("+" if dirty.stdout.strip() else ""),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def write(section: str, measured: dict[str, Any]) -> Path:
    """Writes `docs/results/<section>.json` and returns its path."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{section}.json"
    path.write_text(json.dumps({"section": section, "conditions": conditions(), **measured}, indent=1) + "\n")
    return path


def read(section: str) -> dict[str, Any]:
    """What `write` wrote. Raises FileNotFoundError."""
    content: dict[str, Any] = json.loads((FOLDER / f"{section}.json").read_text())
    return content


def paired_ratio(ours: list[float], theirs: list[float]) -> float:
    """Median of the ratios of repetitions that ran next to one another, so that slow drifts cancel."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
