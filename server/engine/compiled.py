"""Our own C, compiled once for this machine, in about a second, and kept in the user's cache; optional everywhere."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

COMPILERS = ("cc", "gcc", "clang")
# What -ffast-math has and NaN survives: sums in any order, and no errno.
FLAGS = (
    *("-O3", "-march=native", "-std=gnu11", "-fopenmp", "-shared", "-fPIC"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"),
)
COMPILE_SECONDS = 60


def library(name: str, sources: Sequence[Path]) -> ctypes.CDLL | None:
    """The library made from the first of the sources, which includes the others; None where it cannot be made."""
    path = _compiled(name, sources)
    try:
        return ctypes.CDLL(str(path)) if path is not None else None
    except OSError:
        return None


def _compiled(name: str, sources: Sequence[Path]) -> Path | None:
    """The compiled file, from the cache or made now; None where that fails."""
    # -march=native means another file on another kind of processor, and a home folder may be shared between machines
    text = "".join(source.read_text("utf-8") for source in sources)
    kind = f"{text}{FLAGS}{platform.machine()}{_processor()}"
    path = _cache() / f"{name}-{hashlib.sha256(kind.encode()).hexdigest()[:16]}.so"
    if path.exists():
        return path
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / "made.so"
            command = [compiler, *FLAGS, str(sources[0]), "-o", str(made), "-lm"]
            subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_SECONDS)
            os.replace(made, path)
    except (OSError, subprocess.SubprocessError):
        return None
    return path


def _cache() -> Path:
    return Path("~/.cache/antefix/native").expanduser()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(line for line in lines if line.startswith(("model name", "flags", "Features")))[:4000]
