"""`antefix key`: API keys, straight in the store that ANTEFIX_STORE names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from prefix_store.backends.base import DEFAULT_STORE
from prefix_store.cli.client import fail
from prefix_store.errors import AntefixError
from prefix_store.tenants import DEFAULT_TENANT, SCOPES

if TYPE_CHECKING:
    from prefix_store.store import Store

app = typer.Typer(help="API keys: new, ls, rm.", no_args_is_help=True)


@app.command()
def new(
    tenant: Annotated[str, typer.Option(help="Whose key it is.")] = DEFAULT_TENANT,
    scope: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(SCOPES)}. May be repeated.")] = None,
) -> None:
    """Make a key and print it. It is shown only here; without --scope it may do all but administer."""
    with _store() as store:
        presented, key = store.keys.create(tenant, scope or [name for name in SCOPES if name != "admin"])
    typer.echo(presented)
    typer.echo(f"key {key.id} of {key.tenant}: {', '.join(sorted(key.scopes))}", err=True)


@app.command("ls")
def list_all() -> None:
    """List the keys, without their secrets."""
    with _store() as store:
        for key in store.keys.all():
            typer.echo(f"{key.id}\t{key.tenant}\t{','.join(sorted(key.scopes))}")


@app.command("rm")
def remove(key_id: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """Remove a key; requests with it are refused from now on."""
    with _store() as store:
        if not store.keys.remove(key_id):
            fail(f"there is no key {key_id[:80]!r}")


@contextmanager
def _store() -> Iterator[Store]:
    from prefix_store.store import Store  # imports torch, which takes seconds

    try:
        store = Store.open(os.environ.get("ANTEFIX_STORE") or DEFAULT_STORE, os.environ.get("ANTEFIX_BLOBS") or None)
        try:
            yield store
        finally:
            store.close()
    except AntefixError as error:
        fail(error.message)
