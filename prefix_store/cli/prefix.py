"""`antefix prefix`: the prefixes of a running server."""

from __future__ import annotations

import json
import zipfile
from contextlib import ExitStack
from enum import StrEnum
from io import BytesIO
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer

from prefix_store.cli.client import connect, fail

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
app = typer.Typer(help="Prefixes: list, show, upload, download, remove.", no_args_is_help=True)
Ref = Annotated[str, typer.Argument(help="name or name@version")]


class Format(StrEnum):
    """What `pull` writes."""

    NATIVE = "native"
    PEFT = "peft"


@app.command("ls")
def list_all() -> None:
    """List the current version of every prefix."""
    with connect() as server:
        for item in server.pages("/v1/prefixes"):
            name = f"{item['id']}@{item['version']}"
            typer.echo(f"{name}\t{item['method']}\t{item['virtual_tokens']} tokens\t{item['digest'][:12]}")


@app.command()
def show(ref: Ref) -> None:
    """Show one prefix as JSON."""
    with connect() as server:
        typer.echo(json.dumps(server.get(f"/v1/prefixes/{quote(ref)}"), indent=2))


@app.command()
def push(
    name: Annotated[str, typer.Argument(help="What to call it.")],
    path: Annotated[Path, typer.Argument(help="A native file, or the folder of a PEFT adapter.", exists=True)],
) -> None:
    """Upload a prefix; an existing name gets a new version."""
    paths = {"config": path / CONFIG, "file": path / WEIGHTS} if path.is_dir() else {"file": path}
    missing = [file.name for file in paths.values() if not file.is_file()]
    if missing:
        fail(f"{path} has no {' and no '.join(missing)}")
    with connect() as server, ExitStack() as opened:
        files = {part: (file.name, opened.enter_context(file.open("rb"))) for part, file in paths.items()}
        stored = server.post("/v1/prefixes", data={"id": name}, files=files)
    checked = "" if stored["base_checked"] else "; the file does not say which base model it was made for"
    typer.echo(f"{stored['id']}@{stored['version']} {stored['digest'][:12]}{checked}")


@app.command()
def pull(
    ref: Ref,
    to: Annotated[Path, typer.Argument(help="Where to: a file, or for PEFT a folder.")],
    format: Annotated[Format, typer.Option(help="The server's own format, or a PEFT adapter.")] = Format.NATIVE,
) -> None:
    """Download a prefix."""
    with connect() as server:
        content = server.download(f"/v1/prefixes/{quote(ref)}/export", format=format.value)
    try:
        to.write_bytes(content) if format is Format.NATIVE else _unpack(content, to)
    except OSError as error:
        fail(f"cannot write {to}: {error.strerror or error}")
    typer.echo(str(to))


@app.command("rm")
def remove(ref: Ref) -> None:
    """Remove one version, or a prefix with all its versions."""
    with connect() as server:
        removed = server.delete(f"/v1/prefixes/{quote(ref)}")
    typer.echo(f"removed {removed['id']}, versions {', '.join(map(str, removed['versions']))}")


def _unpack(content: bytes, folder: Path) -> None:
    """Writes the adapter's two files and no others, whatever the archive holds."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(BytesIO(content)) as archive:
        for name in (CONFIG, WEIGHTS):
            (folder / name).write_bytes(archive.read(name))
