"""The `antefix` command. Commands about work speak HTTP to a server; commands about the store open it."""

from __future__ import annotations

import sys
from io import TextIOWrapper
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer


def build() -> typer.Typer:
    """The command with its subcommands. They take a while to load, so that is done where `main` hears of Ctrl-C."""
    from prefix_store.cli import app

    return app.build()


def main() -> None:
    """The entry point."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a letter that a terminal lacks is no reason to fail
    try:
        build()()
    except KeyboardInterrupt:
        sys.exit(130)
