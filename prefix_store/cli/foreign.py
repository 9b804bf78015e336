"""The part of `antefix prefix` that takes what other programs left: converted here, then uploaded like any other."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from prefix_store.cli.client import NOT_ANTEFIX, Client, Failure, checked, connect, fail
from prefix_store.cli.terminal import printable
from prefix_store.errors import InvalidPrefix
from prefix_store.geometry import ModelGeometry

CONVERTED = "prefix.safetensors"  # what an upload is called that was no file here
Template = Annotated[str | None, typer.Option(help="Text with one {prompt}, which goes around text prompts.")]


class Foreign(StrEnum):
    """What `import` reads."""

    AUTO = "auto"
    PEFT_BIN = "peft-bin"
    RINNA = "rinna"
    LI_LIANG = "li-liang"
    CARTRIDGE = "cartridge"


def import_foreign(
    name: Annotated[str, typer.Argument(help="What to call it.")],
    path: Annotated[Path, typer.Argument(help="A pickle file, or the folder of an old PEFT adapter.", exists=True)],
    format: Annotated[Foreign, typer.Option(help="Whose file it is; auto goes by what it holds.")] = Foreign.AUTO,
    template: Template = None,
) -> None:
    """Upload a prefix that another program left in a pickle file. It is opened and converted here."""
    checked(name)
    with connect() as server:
        content = _converted(path, format, template, _geometry(server))
        upload(server, {"id": name}, {"file": (CONVERTED, content)})


def upload(
    server: Client, fields: dict[str, str], files: dict[str, Any], headers: dict[str, str] | None = None
) -> None:
    """Sends a prefix, and shows what has become of it."""
    stored = server.post("/v1/prefixes", data=fields, files=files, headers=headers)
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
