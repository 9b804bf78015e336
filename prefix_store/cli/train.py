"""`antefix train`: examples to a queued job, and its progress."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prefix_store import examples
from prefix_store.cli import watch
from prefix_store.cli.client import Client, Failure, checked, connect, fail
from prefix_store.cli.terminal import clock, printable
from prefix_store.examples import Example
from prefix_store.jobs import BUILT_IN_METHODS

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
        str | None, typer.Option(help=f"{', '.join(BUILT_IN_METHODS)}, or one plugged in. Default: prefix.")
    ] = None,
    virtual_tokens: Annotated[int | None, typer.Option(help=f"The prefix's length. {BY_DATA}")] = None,
    steps: Annotated[int | None, typer.Option(help=f"Optimiser steps. {BY_DATA}")] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the data, in place of steps. Default: by the data.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate. Default: the method's.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="How it falls from there: linear or cosine. Default: linear.")
    ] = None,
    warmup: Annotated[
        float | None, typer.Option(help="The part of the steps that leads up to it. Default: 0.05.")
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="How strongly it is drawn back to its start. Default: 0.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help=f"Examples a step. {BY_DATA}")] = None,
    max_length: Annotated[
        int | None, typer.Option(help=f"Tokens of an example; a longer one loses its prompt's beginning. {BY_DATA}")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same prefix. Default: 0.")] = None,
    init_text: Annotated[
        str | None, typer.Option(help="Text that the prefix starts from. Default: the examples'.")
    ] = None,
    init_from: Annotated[str | None, typer.Option(help="Another prefix to start from: name or name@version.")] = None,
    init: Annotated[str | None, typer.Option(help="random_tokens: start from no text.")] = None,
    frozen_tokens: Annotated[
        int | None, typer.Option(help="How many virtual tokens stay as they start. Default: 1.")
    ] = None,
    bottleneck: Annotated[int | None, typer.Option(help="The inner width of an MLP or LSTM. Default: 512.")] = None,
    feature_map: Annotated[str | None, typer.Option(help="elu or gelu, for prefix_plus. Default: elu.")] = None,
    stacks: Annotated[
        str | None,
        typer.Option(help="Of an encoder-decoder model: self, cross, encoder, with commas. Default: all three."),
    ] = None,
    context: Annotated[
        Path | None,
        typer.Option(help="A text file: answer as if it stood before the prompt.", exists=True, dir_okay=False),
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Text with one {prompt}, in which every prompt stands. Default: none.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Validations without a gain that end it; 0: none. Default: 0.")
    ] = None,
    publish_anyway: Annotated[
        bool | None, typer.Option("--publish-anyway", help="Publish it even if it is no better than no prefix.")
    ] = None,
    wait: Annotated[bool, typer.Option(help="Show progress until the job has ended.")] = True,
) -> None:
    """Train a prefix on a running server's worker. No more is needed than a name and the data."""
    options = {
        "method": method,
        "objective": "distil" if context is not None else None,
        "virtual_tokens": virtual_tokens,
        "steps": steps,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "batch_size": batch_size,
        "max_length": max_length,
        "seed": seed,
        "init_text": init_text,
        "init_from": init_from,
        "init": init,
        "frozen_tokens": frozen_tokens,
        "bottleneck": bottleneck,
        "feature_map": feature_map,
        "stacks": [part.strip() for part in stacks.split(",")] if stacks is not None else None,
        "context": read_text(context) if context is not None else None,
        "template": template,
        "validation_examples": read_examples(validation) if validation is not None else None,
        "patience": patience,
        "publish_anyway": publish_anyway,
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


def read_text(path: Path) -> str:
    """A text file. Ends the command where it is none."""
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        fail(f"{path}: not UTF-8")


def _watch(server: Client, job: dict[str, Any]) -> dict[str, Any]:
    """The job once it has ended. Ctrl-C only ends the watching."""
    try:
        return watch.follow(server, job)
    except KeyboardInterrupt:
        typer.echo(printable(f"the job goes on; to cancel it: antefix jobs cancel {job['id']}"), err=True)
        raise typer.Exit(130) from None
    except Failure as error:
        fail(f"{error}\nthe job is kept and goes on; to see it: antefix jobs show {job['id']}")


def _finish(job: dict[str, Any]) -> None:
    if job["status"] == "failed":
        fail(f"the job failed: {job['error']['message']}")
    if job["status"] == "cancelled":
        fail("the job was cancelled")
    if job["status"] == "paused":
        fail(f"the job was paused; to go on: antefix jobs resume {job['id']}")
    name = job["prefix_id"]
    served = f"{name}@{job['version']} is served; try: antefix generate --prefix {name} 'a prompt'"
    typer.echo(f"trained in {clock(job['finished_at'] - job['started_at'])}")
    typer.echo(printable(served))
