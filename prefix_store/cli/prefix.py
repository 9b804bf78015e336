"""`antefix prefix`: the prefixes of a running server."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from contextlib import ExitStack
from enum import StrEnum
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import typer

from prefix_store.cli import amounts, foreign, names
from prefix_store.cli.client import checked, connect, fail, reference
from prefix_store.cli.foreign import Template, upload
from prefix_store.cli.terminal import printable

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
app = typer.Typer(help="Prefixes: list, upload, download, name, share, remove.", no_args_is_help=True)
Ref = Annotated[str, typer.Argument(help="name, name@version or name@alias; tenant/name for what is shared with you")]
Metadata = Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Free-form notes. May be repeated.")]
IfMatch = Annotated[
    str | None, typer.Option(metavar="DIGEST", help="Only if the current version has this digest; * for any.")
]


class Format(StrEnum):
    """What `pull` writes."""

    NATIVE = "native"
    PEFT = "peft"


@app.command("ls")
def list_all(
    shared: Annotated[bool, typer.Option("--shared", help="What other tenants share with you instead.")] = False,
    method: Annotated[str | None, typer.Option(help="Only those tuned by this method.")] = None,
    metadata: Metadata = None,
) -> None:
    """List the current version of every prefix."""
    filters = {f"metadata.{key}": value for key, value in amounts.pairs(metadata or []).items()}
    order = ("tenant", "id") if shared else ("id",)
    with connect() as server:
        for item in server.pages("/v1/prefixes", *order, shared=shared or None, method=method, **filters):
            typer.echo(names.line(item))


@app.command()
def show(ref: Ref) -> None:
    """Show one prefix as JSON."""
    with connect() as server:
        typer.echo(json.dumps(server.get(reference(ref)), indent=2))


@app.command()
def push(
    name: Annotated[str, typer.Argument(help="What to call it.")],
    path: Annotated[Path, typer.Argument(help="A native file, or the folder of a PEFT adapter.", exists=True)],
    template: Template = None,
    metadata: Metadata = None,
    ttl: Annotated[
        float | None, typer.Option(parser=amounts.seconds, metavar="TIME", help="Let it expire, such as after 7d.")
    ] = None,
    if_match: IfMatch = None,
    new: Annotated[bool, typer.Option("--new", help="Only if there is no prefix of this name.")] = False,
) -> None:
    """Upload a prefix; an existing name gets a new version."""
    checked(name)
    paths = _parts(path)
    fields = {"id": name, "metadata": json.dumps(amounts.pairs(metadata or []))}
    fields |= {"ttl_seconds": f"{ttl:.0f}"} if ttl is not None else {}
    fields |= {"template": template} if template is not None else {}
    with connect() as server, ExitStack() as opened:
        try:
            files = {part: (file.name, opened.enter_context(file.open("rb"))) for part, file in paths.items()}
            headers = {"x-content-sha256": _digest(paths["file"]), **_condition(if_match, new)}
        except OSError as error:
            fail(f"cannot read {error.filename}: {error.strerror}")
        upload(server, fields, files, headers)


@app.command()
def edit(
    ref: Ref,
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A note to set; KEY= takes it away. May be repeated.")
    ] = None,
    pin: Annotated[
        bool | None, typer.Option("--pin/--unpin", help="A pinned version stays and does not expire.")
    ] = None,
    ttl: Annotated[
        float | None, typer.Option(parser=amounts.seconds, metavar="TIME", help="Let it expire, from now on.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Let it not expire.")] = False,
) -> None:
    """Change what may change of a version: its notes, whether it is pinned, when it expires."""
    if keep and ttl is not None:
        fail("--ttl and --keep cannot both be")
    changes: dict[str, Any] = {} if pin is None else {"pinned": pin}
    if keep or ttl is not None:
        changes["ttl_seconds"] = ttl
    notes = amounts.pairs(metadata or [])
    with connect() as server:
        if notes:
            known = server.get(reference(ref))["metadata"]
            changes["metadata"] = {key: value for key, value in {**known, **notes}.items() if value}
        if not changes:
            fail("there is nothing to change: --metadata, --pin, --unpin, --ttl or --keep")
        typer.echo(json.dumps(server.patch(reference(ref), json=changes), indent=2))


@app.command()
def pull(
    ref: Ref,
    to: Annotated[Path, typer.Argument(help="Where to: a file, or for PEFT a folder. What is there is replaced.")],
    format: Annotated[Format, typer.Option(help="The server's own format, or a PEFT adapter.")] = Format.NATIVE,
) -> None:
    """Download a prefix."""
    with connect() as server:
        content = server.download(f"{reference(ref)}/export", format=format.value)
    try:
        to.write_bytes(content) if format is Format.NATIVE else _unpack(content, to)
    except OSError as error:
        fail(f"cannot write {to}: {error.strerror or error}")
    except (zipfile.BadZipFile, KeyError) as error:
        fail(f"the server sent no PEFT adapter: {error}")
    typer.echo(str(to))


@app.command("rm")
def remove(ref: Ref, if_match: IfMatch = None) -> None:
    """Remove one version, or a prefix with all its versions."""
    with connect() as server:
        removed = server.delete(reference(ref), headers=_condition(if_match, new=False))
    typer.echo(printable(f"removed {removed['id']}, versions {', '.join(map(str, removed['versions']))}"))


for command in (names.versions, names.alias, names.unalias, names.rollback, names.share):
    app.command()(command)
app.command("import")(foreign.import_foreign)


def _condition(if_match: str | None, new: bool) -> dict[str, str]:
    """The headers that make a change depend on what is there."""
    if new:
        return {"if-none-match": "*"}
    if if_match is None:
        return {}
    if if_match != "*" and not re.fullmatch(r"[0-9a-f]{64}", if_match):
        fail(f"--if-match takes a digest of 64 hex digits, as `antefix prefix show` prints it, or *; got {if_match!r}")
    return {"if-match": if_match if if_match == "*" else f'"{if_match}"'}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parts(path: Path) -> dict[str, Path]:
    """The files to send, by the name of their part."""
    if path.is_file():
        return {"file": path}
    if not path.is_dir():
        fail(f"{path} is neither a file nor a folder")
    parts = {"config": path / CONFIG, "file": path / WEIGHTS}
    if (path / PICKLED).is_file() and not parts["file"].is_file():
        fail(f"{path} has its tensors in a pickle, {PICKLED}, which is not uploaded; try `antefix prefix import`")
    missing = [file.name for file in parts.values() if not file.is_file()]
    if missing:
        fail(f"{path} is no folder of a PEFT adapter: it has no {' and no '.join(missing)}")
    return parts


def _unpack(content: bytes, folder: Path) -> None:
    """Writes the adapter's two files and no others, whatever the archive holds."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(BytesIO(content)) as archive:
        for name in (CONFIG, WEIGHTS):
            (folder / name).write_bytes(archive.read(name))
