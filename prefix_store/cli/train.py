"""`antefix train`: examples to a queued job, and its progress."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prefix_store import examples
from prefix_store.cli import watch
from prefix_store.cli.client import Client, checked, connect, fail
from prefix_store.cli.terminal import clock, printable
from prefix_store.examples import Example

BY_DATA = "Default: chosen by the data."


def train(
    name: Annotated[str, typer.Option(help="What the prefix will be called.")],
    data: Annotated[
        Path, typer.Option(help=f"JSONL, each line one of {examples.EXPECTED}.", exists=True, dir_okay=False)
    ],
    validation: Annotated[
        Path | None,
        typer.Option(
            help="JSONL to judge by. Default: a tenth of the data, of ten examples or more.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="How it is tuned: prefix, prompt, or one plugged in. Default: prefix.")
    ] = None,
    virtual_tokens: Annotated[int | None, typer.Option(help=f"The prefix's length. {BY_DATA}")] = None,
    steps: Annotated[int | None, typer.Option(help=f"Optimiser steps. {BY_DATA}")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate. Default: the method's.")] = None,
    batch_size: Annotated[int | None, typer.Option(help=f"Examples a step. {BY_DATA}")] = None,
    max_length: Annotated[
        int | None, typer.Option(help=f"Tokens of an example; a longer one loses its prompt's beginning. {BY_DATA}")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same prefix. Default: 0.")] = None,
    init_text: Annotated[
        str | None, typer.Option(help="Text that the prefix starts from. Default: the examples'.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Text with one {prompt}, in which every prompt stands. Default: none.")
    ] = None,
    wait: Annotated[bool, typer.Option(help="Show progress until the job has ended.")] = True,
) -> None:
    """Train a prefix on a running server's worker. No more is needed than a name and the data."""
    options = {
        "method": method,
        "virtual_tokens": virtual_tokens,
        "steps": steps,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "max_length": max_length,
        "seed": seed,
        "init_text": init_text,
        "template": template,
        "validation_examples": read_examples(validation) if validation is not None else None,
    }
    checked(name)
    given = {option: value for option, value in options.items() if value is not None}
    body = {"examples": read_examples(data), **given}
    with connect() as server:
        job = server.post(f"/v1/prefixes/{name}/train", json=body)["job"]
        typer.echo(printable(job["id"]))
        if wait:
            _finish(_watch(server, job))


def read_examples(path: Path) -> list[Example]:
    """A JSONL file's examples; blank lines are passed over. Ends the command with the first lines that are wrong."""
    found, faults = examples.parse(path.read_bytes())
    if faults:
        fail("\n".join(f"{path}, {fault}" for fault in faults))
    if not found:
        fail(f"{path} has no examples")
    return found


def _watch(server: Client, job: dict[str, Any]) -> dict[str, Any]:
    """The job once it has ended. Ctrl-C only ends the watching."""
    try:
        return watch.follow(server, job)
    except KeyboardInterrupt:
        typer.echo(printable(f"the job goes on; to cancel it: antefix jobs cancel {job['id']}"), err=True)
        raise typer.Exit(130) from None


def _finish(job: dict[str, Any]) -> None:
    if job["status"] == "failed":
        fail(f"the job failed: {job['error']['message']}")
    if job["status"] == "cancelled":
        fail("the job was cancelled")
    name = job["prefix_id"]
    served = f"{name}@{job['version']} is served; try: antefix generate --prefix {name} 'a prompt'"
    typer.echo(f"trained in {clock(job['finished_at'] - job['started_at'])}")
    typer.echo(printable(served))
