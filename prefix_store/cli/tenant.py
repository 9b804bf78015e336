"""`antefix tenant`: who uses the store, how much of it they may have, and an end to all that is theirs."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefix_store.cli import amounts
from prefix_store.cli.amounts import counted, size
from prefix_store.cli.client import fail
from prefix_store.cli.opened import opened
from prefix_store.tenants import Quotas, Usage

if TYPE_CHECKING:
    from prefix_store.store import Store

app = typer.Typer(help="Tenants: new, ls, show, quota, rm.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="The tenant, as `antefix tenant ls` lists them.")]


@app.command()
def new(name: Annotated[str, typer.Argument(help="1 to 64 of a-z 0-9 . _ -")]) -> None:
    """Make a tenant. One without quotas has no bounds; `antefix key new --tenant` makes its keys."""
    with opened(create=True) as store:
        store.tenants.create(name)


@app.command("ls")
def list_all() -> None:
    """List the tenants and what they have."""
    with opened() as store:
        for name in store.tenants.names():
            usage = store.tenants.usage(name)
            unfinished = usage.unfinished_jobs
            parts = (name, _prefixes(usage), size(usage.bytes), counted(unfinished, "unfinished job"))
            typer.echo("\t".join(parts))


@app.command()
def show(name: Name) -> None:
    """Show a tenant's quotas, what it has, and its keys' ids, as JSON."""
    with opened() as store:
        _known(store, name)
        shown = {
            "tenant": name,
            "quotas": dataclasses.asdict(store.tenants.quotas(name)),
            "usage": dataclasses.asdict(store.tenants.usage(name)),
            "keys": [key.id for key in store.keys.all() if key.tenant == name],
        }
    typer.echo(json.dumps(shown, indent=2))


def _bound(text: str) -> Any:
    return typer.Option(parser=amounts.bound, metavar="N|none", help=text)


@app.command()
def quota(
    name: Name,
    prefixes: Annotated[str | None, _bound("Names of prefixes.")] = None,
    bytes: Annotated[str | None, _bound("The files of all their versions together, such as 2G.")] = None,
    jobs: Annotated[str | None, _bound("Training jobs that have not ended.")] = None,
    requests_per_minute: Annotated[str | None, _bound("Requests of any kind.")] = None,
    tokens_per_minute: Annotated[str | None, _bound("Tokens of prompts and answers.")] = None,
    concurrent_sequences: Annotated[str | None, _bound("Answers that a server writes at the same time.")] = None,
) -> None:
    """Set what a tenant may have, and show it. `none` takes a bound away; a running server knows within seconds."""
    given = {
        "prefixes": prefixes,
        "bytes": bytes,
        "jobs": jobs,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "concurrent_sequences": concurrent_sequences,
    }
    changes = {
        what: None if value == amounts.NONE else int(value) for what, value in given.items() if value is not None
    }
    with opened() as store:
        _known(store, name)
        quotas = store.tenants.set_quotas(name, changes) if changes else store.tenants.quotas(name)
    for field in dataclasses.fields(Quotas):
        value = getattr(quotas, field.name)
        typer.echo(f"{field.name}\t{amounts.NONE if value is None else value}")


@app.command("rm")
def remove(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Erase a tenant: its keys, prefixes, jobs, training examples and lines of the audit log, to the last byte."""
    with opened() as store:
        usage = store.tenants.usage(name)
        keys = sum(key.tenant == name for key in store.keys.all())
        what = f"{_prefixes(usage)}, {counted(sum(usage.jobs.values()), 'job')}, {counted(keys, 'key')}"
        if not yes:
            typer.confirm(f"Erase tenant {name} with {what}? This cannot be undone", abort=True, err=True)
        erased = store.erase_tenant(name)
    if erased:
        typer.echo(f"erased {name}: {what}; {size(usage.bytes)} of files, {counted(erased, 'record')}")
    else:
        typer.echo(f"nothing was left of a tenant {name}")


def _known(store: Store, name: str) -> None:
    """Ends the command for a tenant of whom there is nothing."""
    if name not in store.tenants.names():
        fail(f"there is no tenant {name[:80]!r}; `antefix tenant ls` lists them, `antefix tenant new` makes one")


def _prefixes(usage: Usage) -> str:
    return f"{counted(usage.prefixes, 'prefix')} ({counted(usage.versions, 'version')})"
