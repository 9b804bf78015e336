"""The terminal: what is safe to show on it, and a bar for bytes on their way."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import NoReturn, TextIO

import typer

BAR_AFTER_SECONDS = 1.0
# Everything that moves the cursor, colours, or turns the direction of writing, apart from \t and \n.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def is_live(stream: TextIO) -> bool:
    """Whether what was written there can be drawn over: a terminal, and no dumb one."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def printable(text: str) -> str:
    """The text with its control characters spelt out: prefixes, and servers, are written by others."""
    return CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode(), text.replace("\r\n", "\n"))


def clock(seconds: float) -> str:
    """`m:ss`, and `h:mm:ss` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def moment(at: float) -> str:
    """A time in UTC, to the second."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@contextmanager
def transfer(doing: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Yields what is to be told the size of every chunk of `total` bytes that went through.

    Where stderr is a terminal and a second has not been enough, a bar stands there until the end.
    """
    if not is_live(sys.stderr):
        yield lambda size: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    task = bar.add_task(doing, total=total)
    late = threading.Timer(BAR_AFTER_SECONDS, bar.start)
    late.daemon = True
    late.start()
    try:
        yield lambda size: bar.advance(task, size)
    finally:
        late.cancel()
        late.join()
        bar.stop()


def fail(message: str) -> NoReturn:
    """Ends the command."""
    typer.echo(f"antefix: {printable(message)}", err=True)
    raise typer.Exit(1)
