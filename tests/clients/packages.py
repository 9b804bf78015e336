"""Clients that the lock does not have: each with what it needs in a folder of its own, made once, kept and reused.

A Python client's folder has only what the lock has not, or has otherwise. It stands before the environment's own
packages on the path, so that nothing of the environment is copied or changed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CACHE = Path("~/.cache/antefix/clients").expanduser()
INSTALL_SECONDS, PROBE_SECONDS = 300, 30
OLDEST_NODE = 20
# Where a client would look at the network by itself.
OFFLINE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false"}


def environment(client: str | None = None) -> dict[str, str]:
    """The variables under which Python finds a client of `requirements-CLIENT.txt`, or those of the lock alone.

    Skips the test where the packages are not here and the index cannot be reached.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ANTEFIX_", "OPENAI_"))}
    return kept | OFFLINE | {"PYTHONPATH": str(python_folder(client)) if client else ""}


def python_folder(client: str) -> Path:
    """Has the packages of `requirements-CLIENT.txt`."""
    wanted = HERE / f"requirements-{client}.txt"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    install = [*pip, "install", "--quiet", "--no-deps", "--no-compile", "--only-binary=:all:", "-r", str(wanted)]
    key = f"{sysconfig.get_platform()} {sysconfig.get_python_version()} {wanted.read_text()}"
    return kept(client, key, [*install, "--target"], [*pip, "--retries", "0", "index", "versions", "pip"])


def node_folder(package: str) -> Path:
    """Has a package of npm in its `node_modules`. Skips the test where there is no Node.js, or one that is too old."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("needs node and npm")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.removeprefix("v").partition(".")[0]) < OLDEST_NODE:
        pytest.skip(f"needs node {OLDEST_NODE} or newer, this is {version}")
    install = [npm, "install", "--no-save", "--ignore-scripts", "--no-audit", "--no-fund", package, "--prefix"]
    return kept("node", f"{version} {package}", install, [npm, "view", "--fetch-retries=0", package, "version"])


def kept(name: str, key: str, install: list[str], probe: list[str]) -> Path:
    """The folder that `install FOLDER` has made, now or before. Of two that make it at once, one stays.

    Skips the test where `probe` does not find the package index.
    """
    folder = CACHE / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if folder.exists():
        return folder
    if not _succeeds(probe):
        pytest.skip(f"{name} is not installed, and its package index cannot be reached")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as parent:
        made = Path(parent) / "made"
        made.mkdir()
        done = subprocess.run([*install, str(made)], capture_output=True, text=True, timeout=INSTALL_SECONDS)
        assert done.returncode == 0, done.stderr
        try:
            made.rename(folder)
        except OSError:
            assert folder.exists()
    return folder


def _succeeds(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=PROBE_SECONDS).returncode == 0
    except subprocess.TimeoutExpired:
        return False
