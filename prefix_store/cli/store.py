"""`antefix store`: the store as a whole."""

from __future__ import annotations

from typing import Annotated

import typer

from prefix_store.cli.amounts import counted
from prefix_store.cli.opened import opened, store_at

app = typer.Typer(help="The store as a whole: collect, migrate.", no_args_is_help=True)


@app.command()
def collect() -> None:
    """Remove what has expired and files that nothing names any more. A running server does so every hour."""
    with opened() as store:
        removed = store.collect()
    typer.echo(f"removed {counted(removed, 'file')}")


@app.command()
def migrate(
    source: Annotated[str, typer.Argument(help="The address of a store, as ANTEFIX_STORE holds it.")],
    target: Annotated[str, typer.Argument(help="The address of an empty one, or of one that this was cut short in.")],
    source_blobs: Annotated[str | None, typer.Option(help="Where its files are, as ANTEFIX_BLOBS holds it.")] = None,
    target_blobs: Annotated[str | None, typer.Option(help="Where the files go to.")] = None,
) -> None:
    """Copy a whole store, SQLite or Redis, into another and compare the two. Stop servers and workers first."""
    from prefix_store.migration import migrate as copy

    with (
        store_at(source, source_blobs, create=False) as old,
        store_at(target, target_blobs, create=True, unfinished=True) as new,
    ):
        copied = copy(old, new, lambda line: typer.echo(line, err=True))
    typer.echo(f"copied {counted(copied, 'record')}; both are the same")
