"""`antefix audit`: who changed what, straight from the store that ANTEFIX_STORE names."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from prefix_store.audit import AuditEntry
from prefix_store.cli import amounts
from prefix_store.cli.opened import opened
from prefix_store.cli.terminal import moment, printable


def audit(
    tenant: Annotated[str | None, typer.Option(help="Only what was done to this tenant's.")] = None,
    since: Annotated[
        float | None, typer.Option(parser=amounts.seconds, metavar="TIME", help="Only the last 24h, 30d, …")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Show every change of the store, oldest first: when, by whom, whose, what, and of which file's digest."""
    with opened() as store:
        with store.backend.view() as view:
            begin = view.now - since if since is not None else 0.0
        for entry in store.audit.entries(max(begin, 0.0), tenant):
            typer.echo(json.dumps(dataclasses.asdict(entry)) if as_json else _line(entry))


def _line(entry: AuditEntry) -> str:
    digest = entry.digest[:12] if entry.digest is not None else "-"
    return printable("\t".join((moment(entry.at), entry.by, entry.tenant or "-", entry.action, entry.target, digest)))
