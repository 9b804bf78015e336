"""The part of `antefix prefix` that is about names: versions, aliases, going back, sharing."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from prefix_store.cli.client import checked, connect, fail, reference
from prefix_store.cli.terminal import printable

Name = Annotated[str, typer.Argument(help="The prefix's name.")]


def versions(name: Annotated[str, typer.Argument(help="The prefix's name; tenant/name for a shared one.")]) -> None:
    """List the versions of a prefix, and which are current or have an alias."""
    if "@" in name:
        fail(f"versions are a name's; got {name!r}")
    with connect() as server:
        for item in server.pages(f"{reference(name)}/versions", "version"):
            typer.echo(line(item))


def alias(
    ref: Annotated[str, typer.Argument(help="The version: name@version.")],
    alias: Annotated[str, typer.Argument(help="What else to call it: name@ALIAS then means this version.")],
) -> None:
    """Give a version an alias, such as `stable`, or move the alias there, from one moment to the next."""
    name, number = _version(ref)
    with connect() as server:
        made = server.put(f"{reference(name)}/aliases/{checked(alias)}", json={"version": number})
    typer.echo(line(made))


def unalias(ref: Annotated[str, typer.Argument(help="name@alias")]) -> None:
    """Take an alias away; the version stays."""
    name, at, tail = ref.partition("@")
    if not at:
        fail(f"expected name@alias, got {ref!r}")
    with connect() as server:
        server.delete(f"{reference(name)}/aliases/{checked(tail)}")


def rollback(
    ref: Annotated[str, typer.Argument(help="name: back to the version before; name@version: to that one.")],
) -> None:
    """Make another version the current one. Nothing is removed, and a later upload is the newest again."""
    name, number = _version(ref) if "@" in ref else (ref, None)
    with connect() as server:
        made = server.post(f"{reference(name)}/rollback", json={"version": number})
    typer.echo(line(made))


def share(
    name: Name,
    tenants: Annotated[list[str] | None, typer.Argument(help="Who else may use it; nobody besides.")] = None,
    everyone: Annotated[bool, typer.Option("--all", help="Share it with every tenant.")] = False,
    nobody: Annotated[bool, typer.Option("--none", help="Share it with nobody any more.")] = False,
) -> None:
    """Let other tenants use a prefix as TENANT/NAME. Without any, show whom it is shared with."""
    if sum((bool(tenants), everyone, nobody)) > 1:
        fail("name tenants, or --all, or --none")
    path = f"{reference(name)}/sharing"
    with connect() as server:
        if tenants or everyone or nobody:
            shared = server.put(path, json={"tenants": "all" if everyone else list(tenants or ())})
        else:
            shared = server.get(path)
    found = shared["tenants"]
    with_whom = "every tenant" if found == "all" else ", ".join(found) or "nobody"
    typer.echo(printable(f"{name} is shared with {with_whom}"))


def line(item: dict[str, Any]) -> str:
    """A version in one line."""
    owner = f"{item['tenant']}/" if "tenant" in item else ""
    parts = [f"{owner}{item['id']}@{item['version']}", item["method"], f"{item['virtual_tokens']} tokens"]
    parts.append(item["digest"][:12])
    called = [*(["current"] if item.get("current") else []), *item.get("aliases", [])]
    return printable("\t".join([*parts, *([", ".join(called)] if called else [])]))


def _version(ref: str) -> tuple[str, int]:
    name, _, number = ref.partition("@")
    if not (number.isascii() and number.isdigit()):
        fail(f"expected name@version, got {ref!r}")
    return name, int(number)
