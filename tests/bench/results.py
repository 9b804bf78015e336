"""Results as files: one JSON a section, with everything needed to judge a number and to know whether it still holds."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from server.engine.attention import native

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "results"
CACHE = Path("~/.cache/antefix/bench").expanduser()
PACKAGES = ("torch", "transformers", "peft")
# What a number depends on, apart from the machine and the packages.
MEASURED = ("server", "prefix_store", "trainer", "tests/bench")
# Written by the benchmarks themselves.
OUTPUTS = (":!docs/results", ":!README.md")


def conditions() -> dict[str, Any]:
    """Where and with what a measurement was made. `sources` names the code that was measured, commit or not."""
    commit = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "-uno", "--", ".", *OUTPUTS)
    return {
        "commit": commit + ("+" if changed else ""),
        "sources": sources(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "attention": "native" if native.is_available(torch.float32) else "cpu",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


@functools.cache
def sources() -> str:
    """A digest of the code that is measured and of the code that measures it."""
    digest = hashlib.sha256()
    for folder in MEASURED:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".c", ".h"):
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def path(section: str) -> Path:
    """Where a section's results are, if there are any."""
    return FOLDER / f"{section}.json"


def write(section: str, measured: dict[str, Any]) -> Path:
    """Writes `docs/results/<section>.json` and returns its path."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"section": section, "conditions": conditions(), **measured}, indent=1, ensure_ascii=False)
    path(section).write_text(text + "\n")
    return path(section)


def read(section: str) -> dict[str, Any]:
    """What `write` wrote. Raises FileNotFoundError."""
    content: dict[str, Any] = json.loads(path(section).read_text())
    return content


def is_current(section: str) -> bool:
    """Whether the file was made by this code on this machine."""
    try:
        return _lasting(read(section)["conditions"]) == _lasting(conditions())
    except (FileNotFoundError, KeyError):
        return False


class Kept:
    """Finished parts of a section that is under way, outside the tree: an interrupted run goes on where it stood.

    Parts made by other code or on another machine are not used. Without a folder nothing is kept.
    """

    def __init__(self, section: str, folder: Path | None = None) -> None:
        made_by = hashlib.sha256(json.dumps(_lasting(conditions())).encode()).hexdigest()[:16]
        self._path = folder / f"{section}-{made_by}.json" if folder is not None else None

    def part(self, name: str, measure: Callable[[], Any]) -> Any:
        """What `measure` returns, now or in a run before this one."""
        parts = self._read()
        if name not in parts:
            parts[name] = json.loads(json.dumps(measure()))  # the same types whether it was kept or not
            self._write(parts)
        return parts[name]

    def clear(self) -> None:
        """Forgets all of it."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        if self._path is None or not self._path.exists():
            return {}
        parts: dict[str, Any] = json.loads(self._path.read_text())
        return parts

    def _write(self, parts: dict[str, Any]) -> None:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(parts))


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the ratios of repetitions that ran next to one another, so that slow drifts cancel."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-len(ordered) * percent // 100) - 1)]


def percentiles(values: Sequence[float], *percents: float, scale: float = 1.0, digits: int = 2) -> dict[str, float]:
    """Several, by their names: p50, p90, …; by default these and p99."""
    return {f"p{p:g}": round(scale * percentile(values, p), digits) for p in percents or (50, 90, 99)}


def _lasting(found: dict[str, Any]) -> dict[str, Any]:
    """Conditions without the commit: one that touches no measured code leaves the numbers as they are."""
    return {name: value for name, value in found.items() if name != "commit"}


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""  # a copy of the tree on a machine without git; `sources` says what it is
    return done.stdout.strip()


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
