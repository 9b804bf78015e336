"""`antefix doctor`: looks at everything that a server and a worker need, and says what to do."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import typer

from prefix_store.backends.base import DEFAULT_STORE
from prefix_store.cli.checks.finding import Finding, Level, problem
from prefix_store.cli.secret import secret
from prefix_store.cli.terminal import is_live, printable
from prefix_store.errors import AntefixError

if TYPE_CHECKING:
    from prefix_store.store import Store


def doctor() -> None:
    """Check model, store, disk, versions, device and ports, and say what to do. Exit status 1 if there is a problem.

    Changes nothing. A server may run meanwhile; run it as the same user and with the same settings.
    """
    worst = Level.OK
    for finding in _findings():
        typer.echo(printable(str(finding)))
        worst = finding.level if finding.level is Level.PROBLEM else worst
    if worst is Level.PROBLEM:
        raise typer.Exit(1)


def _findings() -> Iterator[Finding]:
    from prefix_store.cli.checks import machine, model, storage  # with what they import, seconds

    address = secret("ANTEFIX_STORE") or DEFAULT_STORE
    host = os.environ.get("ANTEFIX_HOST") or "127.0.0.1"
    yield from machine.versions()
    yield from machine.settings()
    yield from machine.device(os.environ.get("ANTEFIX_DEVICE") or "auto")
    yield from model.look(os.environ.get("ANTEFIX_MODEL") or None)
    with ExitStack() as stack:
        store: Store | None = None
        if storage.is_absent(address):
            yield storage.to_be_made(address)
        else:
            try:
                store = _opened(address)
                stack.callback(store.close)
            except AntefixError as error:
                yield storage.closed(error)
        yield from machine.disks(storage.folders(store, address))
        yield from machine.ports(os.environ)
        if store is not None:
            try:
                yield from storage.look(store, address, host, _Progress())
            except AntefixError as error:
                yield problem("store", error.message)


def _opened(address: str) -> Store:
    from prefix_store.store import Store

    return Store.open(address, os.environ.get("ANTEFIX_BLOBS") or None, create=False)


class _Progress:
    """A line on stderr that counts the files: drawn over on a terminal, elsewhere once at the end."""

    def __call__(self, done: int, total: int) -> None:
        live = is_live(sys.stderr)
        if live or done == total:
            typer.echo(("\r" if live else "") + f"files: {done} of {total}", nl=not live or done == total, err=True)
