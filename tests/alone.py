"""A process that has torch and transformers, and none of what only HTTP, Redis and the command line need.

So it is on a GPU machine that was set up for torch alone. There the blocked packages are not broken but absent: the
process, and those that it starts, find no module of theirs, as if they had never been installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# jinja2 and packaging come with torch and transformers.
BLOCKED = (
    *("fastapi", "starlette", "uvicorn", "pydantic", "pydantic_core", "pydantic_settings", "python_multipart"),
    *("multipart", "httpx", "redis", "limits", "prometheus_client", "structlog", "typer", "rich", "llguidance"),
)
# Every interpreter imports a module of that name as it starts.
SITE, BLOCK = (
    "sitecustomize.py",
    f"""
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {BLOCKED!r} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
""",
)


def environment(folder: Path) -> dict[str, str]:
    """Variables for such a process, which reads a file in the folder."""
    (folder / SITE).write_text(BLOCK)
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def run(folder: Path, code: str) -> list[str]:
    """The lines that the code prints, run in the tree. Raises CalledProcessError, whose `stderr` says why it failed."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment(folder))
    return done.stdout.splitlines()
