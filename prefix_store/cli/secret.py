"""Settings of the command line that are secrets: given as such, or in a file."""

from __future__ import annotations

import os

from prefix_store import secret_file
from prefix_store.cli.terminal import fail


def secret(name: str) -> str:
    """A variable, or what the file holds that `<name>_FILE` names, which goes before it; empty where neither is set."""
    path = os.environ.get(f"{name}_FILE")
    if not path:
        return os.environ.get(name, "")
    try:
        return secret_file.read(path)
    except ValueError as error:
        fail(f"{name}_FILE={path[:80]!r}: {error}")
