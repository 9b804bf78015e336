"""`antefix prefix`: the prefixes of a running server. Foreign pickles are opened here, and never sent."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from contextlib import ExitStack
from enum import StrEnum
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from prefix_store.cli.client import NOT_ANTEFIX, Client, Failure, checked, connect, fail
from prefix_store.cli.terminal import printable
from prefix_store.errors import InvalidName, InvalidPrefix
from prefix_store.geometry import ModelGeometry
from prefix_store.prefix import PrefixRef
from prefix_store.tenants import DEFAULT_TENANT

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
CONVERTED = "prefix.safetensors"  # what an upload is called that was no file here
app = typer.Typer(help="Prefixes: list, show, upload, download, remove.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="What to call it.")]
Template = Annotated[str | None, typer.Option(help="Text with one {prompt}, which goes around text prompts.")]
Ref = Annotated[str, typer.Argument(help="name or name@version, as `antefix prefix ls` lists them")]


class Format(StrEnum):
    """What `pull` writes."""

    NATIVE = "native"
    PEFT = "peft"


class Foreign(StrEnum):
    """What `import` reads."""

    AUTO = "auto"
    PEFT_BIN = "peft-bin"
    RINNA = "rinna"
    LI_LIANG = "li-liang"
    CARTRIDGE = "cartridge"


@app.command("ls")
def list_all() -> None:
    """List the current version of every prefix."""
    with connect() as server:
        for item in server.pages("/v1/prefixes"):
            name = f"{item['id']}@{item['version']}"
            line = f"{name}\t{item['method']}\t{item['virtual_tokens']} tokens\t{item['digest'][:12]}"
            typer.echo(printable(line))


@app.command()
def show(ref: Ref) -> None:
    """Show one prefix as JSON."""
    with connect() as server:
        typer.echo(json.dumps(server.get(path_of(ref)), indent=2))


@app.command()
def push(
    name: Name,
    path: Annotated[Path, typer.Argument(help="A native file, or the folder of a PEFT adapter.", exists=True)],
    template: Template = None,
) -> None:
    """Upload a prefix; an existing name gets a new version."""
    checked(name)
    paths = _parts(path)
    with connect() as server, ExitStack() as opened:
        try:
            files = {part: (file.name, opened.enter_context(file.open("rb"))) for part, file in paths.items()}
        except OSError as error:
            fail(f"cannot read {error.filename}: {error.strerror}")
        fields = {"id": name} if template is None else {"id": name, "template": template}
        _upload(server, fields, files)


@app.command("import")
def import_foreign(
    name: Name,
    path: Annotated[Path, typer.Argument(help="A pickle file, or the folder of an old PEFT adapter.", exists=True)],
    format: Annotated[Foreign, typer.Option(help="Whose file it is; auto goes by what it holds.")] = Foreign.AUTO,
    template: Template = None,
) -> None:
    """Upload a prefix that another program left in a pickle file. It is opened and converted here."""
    checked(name)
    with connect() as server:
        content = _converted(path, format, template, _geometry(server))
        _upload(server, {"id": name}, {"file": (CONVERTED, content)})


@app.command()
def pull(
    ref: Ref,
    to: Annotated[Path, typer.Argument(help="Where to: a file, or for PEFT a folder. What is there is replaced.")],
    format: Annotated[Format, typer.Option(help="The server's own format, or a PEFT adapter.")] = Format.NATIVE,
) -> None:
    """Download a prefix."""
    with connect() as server:
        content = server.download(f"{path_of(ref)}/export", format=format.value)
    try:
        to.write_bytes(content) if format is Format.NATIVE else _unpack(content, to)
    except OSError as error:
        fail(f"cannot write {to}: {error.strerror or error}")
    except (zipfile.BadZipFile, KeyError) as error:
        fail(f"the server sent no PEFT adapter: {error}")
    typer.echo(str(to))


@app.command("rm")
def remove(ref: Ref) -> None:
    """Remove one version, or a prefix with all its versions."""
    with connect() as server:
        removed = server.delete(path_of(ref))
    typer.echo(printable(f"removed {removed['id']}, versions {', '.join(map(str, removed['versions']))}"))


def _upload(server: Client, fields: dict[str, str], files: dict[str, Any]) -> None:
    """Sends a prefix, and shows what has become of it."""
    stored = server.post("/v1/prefixes", data=fields, files=files)
    note = "" if stored["base_checked"] else "; the file does not say which base model it was made for"
    typer.echo(printable(f"{stored['id']}@{stored['version']} {stored['digest'][:12]}{note}"))


def _geometry(server: Client) -> ModelGeometry:
    """What a prefix must match to be served there. Raises Failure."""
    try:
        return ModelGeometry.from_json(server.get("/v1/model")["geometry"])
    except ValueError as error:
        raise Failure(f"{NOT_ANTEFIX}: {error}") from error


def _converted(path: Path, format: Foreign, template: str | None, geometry: ModelGeometry) -> bytes:
    """The native file of a foreign one. Ends the command for one that is damaged, unsafe or unfit."""
    from prefix_store import codec
    from prefix_store.formats import pickled

    try:
        manifest, tensors = pickled.read(path, format, geometry)
        return codec.encode(dataclasses.replace(manifest, template=template), tensors)
    except InvalidPrefix as error:
        fail(f"{path}: {error.message}")


def path_of(ref: str) -> str:
    """Where a prefix is over HTTP. What is no reference is refused here, for `..` would lead elsewhere."""
    try:
        PrefixRef.parse(ref, DEFAULT_TENANT)
    except InvalidName as error:
        fail(error.message)
    return f"/v1/prefixes/{quote(ref)}"


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
