"""`antefix generate`: text from a running server, as it comes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from prefix_store.cli.client import Failure, connect
from prefix_store.cli.terminal import printable


def generate(
    prompt: Annotated[str, typer.Argument(help="What the text begins with.")],
    prefix: Annotated[str | None, typer.Option(help="A prefix: name or name@version. Without: the bare model.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="At most so many tokens; the server has a default.")] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text. May be repeated.")] = None,
    num_beams: Annotated[int | None, typer.Option(help="Search for the likeliest text with so many beams.")] = None,
    length_penalty: Annotated[float | None, typer.Option(help="With beams: above 0 favours long texts.")] = None,
) -> None:
    """Generate text and print it as it comes."""
    body = {
        "prompt": prompt,
        "prefix_id": prefix,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "stop": stop or None,
        "num_beams": num_beams,
        "length_penalty": length_penalty,
        "stream": True,
    }
    shown = printable if sys.stdout.isatty() else str
    begun = False
    with connect() as server:
        try:
            for event in server.stream("/generate", body):
                typer.echo(shown(event["text"]), nl=False)
                begun = True
        except Failure:
            if begun:
                typer.echo()
            raise
    typer.echo()
