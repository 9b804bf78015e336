"""`antefix compare`: one prompt after several prefixes at the same time, side by side."""

from __future__ import annotations

import sys
import threading
import time
from typing import Annotated, Any

import typer

from prefix_store.cli import columns
from prefix_store.cli.client import Client, Failure, connect, fail
from prefix_store.cli.columns import Column
from prefix_store.cli.terminal import is_live, printable


def compare(
    prompt: Annotated[str, typer.Argument(help="What every text begins with.")],
    prefix: Annotated[
        list[str] | None, typer.Option(help="Prefixes with commas between: name or name@version. May be repeated.")
    ] = None,
    bare: Annotated[bool, typer.Option("--bare", help="Add a column without a prefix: the bare model.")] = False,
    max_tokens: Annotated[int, typer.Option(help="At most so many tokens a column.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 leaves nothing to chance: the prefix alone differs.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same texts.")] = None,
) -> None:
    """Show side by side what several prefixes make of a prompt."""
    names = _names(prefix or [])
    if not names and not bare:
        fail("there is nothing to compare: name prefixes with --prefix a,b or add --bare")
    shown = [Column(name) for name in ([None] if bare else []) + names]
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": temperature, "seed": seed, "stream": True}
    with connect() as server:
        server.get("/healthz")  # a wrong address is one error, not every column's
        threads = [threading.Thread(target=_fill, args=(server, column, body), daemon=True) for column in shown]
        for thread in threads:
            thread.start()
        try:
            (columns.draw if is_live(sys.stdout) else columns.write)(shown, threads)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
    _report(shown)


def _names(lists: list[str]) -> list[str | None]:
    """The references in `a,b` and `c`."""
    names: list[str | None] = []
    for text in lists:
        for name in text.split(","):
            if not name.strip():
                fail(f"--prefix takes names with commas between, got {text!r}; --bare adds the bare model")
            names.append(name.strip())
    return names


def _fill(server: Client, column: Column, body: dict[str, Any]) -> None:
    """Streams an answer into its column. Whatever breaks it is the column's error: no one else hears of a thread's."""
    try:
        for event in server.stream("/generate", body | {"prefix_id": column.prefix}):
            column.take(event, time.monotonic())
    except Failure as failure:
        column.error = str(failure)
    except Exception as error:
        column.error = f"the answer cannot be shown: {type(error).__name__}: {error}"


def _report(shown: list[Column]) -> None:
    """Ends the command with the columns' errors; one that all have is said once."""
    errors = [(column.title, column.error) for column in shown if column.error is not None]
    if len(errors) == len(shown) and len({error for _, error in errors}) == 1:
        fail(errors[0][1])
    for title, error in errors:
        typer.echo(printable(f"antefix: {title}: {error}"), err=True)
    if errors:
        raise typer.Exit(1)
