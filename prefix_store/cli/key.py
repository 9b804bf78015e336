"""`antefix key`: API keys, straight in the store that ANTEFIX_STORE names."""

from __future__ import annotations

from typing import Annotated

import typer

from prefix_store.cli import amounts
from prefix_store.cli.client import fail
from prefix_store.cli.opened import opened
from prefix_store.cli.terminal import moment
from prefix_store.tenants import DEFAULT_TENANT, SCOPES, TENANT_SCOPES, ApiKey

app = typer.Typer(help="API keys: new, ls, rotate, rm.", no_args_is_help=True)
KeyId = Annotated[str, typer.Argument(metavar="ID", help="eight letters and digits, as `antefix key ls` lists them")]


@app.command()
def new(
    tenant: Annotated[str, typer.Option(help="Whose key it is; a new tenant is made.")] = DEFAULT_TENANT,
    scope: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(SCOPES)}. May be repeated.")] = None,
    expires: Annotated[
        float | None, typer.Option(parser=amounts.seconds, metavar="TIME", help="How long it is good, such as 30d.")
    ] = None,
) -> None:
    """Make a key and print it. It is shown only here; without --scope it may do all with what is the tenant's own."""
    with opened(create=True) as store:
        presented, key = store.keys.create(tenant, scope or TENANT_SCOPES, expires)
    _show(presented, key)


@app.command()
def rotate(
    key_id: KeyId,
    overlap: Annotated[
        float, typer.Option(parser=amounts.seconds, metavar="TIME", help="How long the old one is still good.")
    ] = "24h",  # type: ignore[assignment]
    expires: Annotated[
        float | None,
        typer.Option(
            parser=amounts.seconds,
            metavar="TIME",
            help="How long the new one is good, if not as long as the old was.",
        ),
    ] = None,
) -> None:
    """Make another key of the same tenant and scopes, print it, and let the old one expire."""
    with opened() as store:
        presented, key = store.keys.rotate(key_id, overlap, expires)
    _show(presented, key)
    typer.echo(f"key {key_id} ends within {overlap / 3600:g} h; to end it now: antefix key rm {key_id}", err=True)


@app.command("ls")
def list_all() -> None:
    """List the keys, without their secrets."""
    with opened() as store, store.backend.view() as view:
        for key in store.keys.all():
            line = f"{key.id}\t{key.tenant}\t{','.join(sorted(key.scopes))}"
            typer.echo(line + (f"\t{_end(key, view.now)}" if key.expires_at is not None else ""))


@app.command("rm")
def remove(key_id: KeyId) -> None:
    """Remove a key; requests with it are refused from now on."""
    with opened() as store:
        if not store.keys.remove(key_id):
            fail(f"there is no key {key_id[:80]!r}")


def _show(presented: str, key: ApiKey) -> None:
    typer.echo(presented)
    end = f", until {moment(key.expires_at)}" if key.expires_at is not None else ""
    typer.echo(f"key {key.id} of {key.tenant}: {', '.join(sorted(key.scopes))}{end}", err=True)


def _end(key: ApiKey, now: float) -> str:
    assert key.expires_at is not None
    return ("expired " if key.has_expired(now) else "until ") + moment(key.expires_at)
