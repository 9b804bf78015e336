"""Texts side by side as they come: columns that fill on a terminal, blocks in order where there is none."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from prefix_store.cli.terminal import printable

if TYPE_CHECKING:
    from rich.console import Console, OverflowMethod, RenderableType

NARROWEST, GAP = 24, 2
FRAMES_A_SECOND = 10
AROUND = 4  # lines of a row that are no text: title, rule, figures, and an empty one below


@dataclass
class Column:
    """One text as it comes, after a prefix or none. A thread fills it while another shows it.

    `tokens` counts the pieces that came until the last event tells the true number.
    """

    prefix: str | None
    version: int | None = None
    text: str = ""
    tokens: int = 0
    first_at: float | None = None
    last_at: float | None = None
    finish_reason: str | None = None
    error: str | None = None

    @property
    def title(self) -> str:
        """What was asked for, with the version that answers once it is known."""
        if self.prefix is None:
            return "(no prefix)"
        return self.prefix if self.version is None else f"{self.prefix.partition('@')[0]}@{self.version}"

    @property
    def figures(self) -> str:
        """Speed, and how it ended."""
        if self.error is None and self.first_at is None and self.finish_reason is None:
            return "waiting"
        return "  ".join(filter(None, (rate([self]), "error" if self.error is not None else self.finish_reason)))

    def take(self, event: dict[str, Any], now: float) -> None:
        """Adds an event of the stream."""
        if event["text"]:
            self.text += event["text"]
            self.tokens += 1
            self.first_at = now if self.first_at is None else self.first_at
            self.last_at = now
        if event["finish_reason"] is not None:
            self.finish_reason = event["finish_reason"]
            self.tokens, self.last_at = event["usage"]["completion_tokens"], now
            self.version = event["prefix"] and event["prefix"]["version"]


def rate(columns: Sequence[Column]) -> str:
    """Tokens a second of all columns together; the clock starts with the first token, which is not counted."""
    begun = [column.first_at for column in columns if column.first_at is not None]
    ended = [column.last_at for column in columns if column.last_at is not None]
    seconds = max(ended) - min(begun) if begun and ended else 0.0
    tokens = sum(column.tokens for column in columns) - 1
    return f"{tokens / seconds:,.0f} tokens/s" if tokens > 0 and seconds > 0 else ""


def total(columns: Sequence[Column]) -> str:
    """The last line."""
    tokens = f"{sum(column.tokens for column in columns):,} tokens"
    return "all together: " + "  ".join(filter(None, (tokens, rate(columns))))


def write(columns: Sequence[Column], threads: Sequence[threading.Thread]) -> None:
    """Prints every column when it and those before it are done, as plain text."""
    for column, thread in zip(columns, threads, strict=True):
        thread.join()
        error = [f"error: {column.error}"] if column.error is not None else []
        lines = [f"== {column.title}", *filter(None, [column.text]), *error, f"-- {column.figures}", ""]
        typer.echo(printable("\n".join(lines)))
    typer.echo(total(columns))


def draw(columns: Sequence[Column], threads: Sequence[threading.Thread]) -> None:
    """Shows the columns as they fill, as much as the terminal holds, and in the end, or on Ctrl-C, all of them."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    try:
        with Live(
            get_renderable=lambda: board(columns, console, console.height),
            console=console,
            refresh_per_second=FRAMES_A_SECOND,
            transient=True,
        ):
            for thread in threads:
                thread.join()
    finally:
        console.print(board(columns, console))


def board(columns: Sequence[Column], console: Console, height: int | None = None) -> RenderableType:
    """The columns, in rows where the terminal is narrow; within a height, only the ends of their texts."""
    from rich.console import Group
    from rich.text import Text

    across = max(1, min(len(columns), (console.width + GAP) // (NARROWEST + GAP)))
    width = (console.width + GAP) // across - GAP
    rows = [columns[start : start + across] for start in range(0, len(columns), across)]
    lines = None
    if height is not None:
        rows = rows[: max(1, (height - 2) // (AROUND + 1))]
        lines = max(1, (height - 2) // len(rows) - AROUND)
    return Group(*(_row(row, console, width, lines) for row in rows), Text(total(columns), style="bold"))


def _row(columns: Sequence[Column], console: Console, width: int, lines: int | None) -> RenderableType:
    from rich.rule import Rule
    from rich.table import Table
    from rich.text import Text

    row = Table.grid(padding=(0, GAP, 0, 0))
    # cut off while it lives, where every line more would push the frame over the terminal's edge
    cut = lines is not None
    overflow: OverflowMethod = "ellipsis" if cut else "fold"
    for _ in columns:
        row.add_column(width=width)
    row.add_row(*(Text(printable(column.title), "bold", overflow=overflow, no_wrap=cut) for column in columns))
    row.add_row(*(Rule(style="dim") for _ in columns))
    row.add_row(*(_body(column, console, width, lines) for column in columns))
    row.add_row(*(Text(printable(column.figures), "dim", overflow=overflow, no_wrap=cut) for column in columns))
    row.add_row()
    return row


def _body(column: Column, console: Console, width: int, lines: int | None) -> RenderableType:
    from rich.text import Text

    known = column.text
    if lines is not None:  # wrapping all of a long text ten times a second would be slow: one or two screens are enough
        screen = lines * width
        known = known[max(0, len(known) // screen - 1) * screen :]
    text = Text(printable(known), overflow="fold")
    if column.error is not None:
        text.append(("\n" if known else "") + printable(column.error), "red")
    if lines is None:
        return text
    return Text("\n", overflow="fold").join(text.wrap(console, width, overflow="fold")[-lines:])
