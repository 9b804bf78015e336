"""`antefix train`: examples to a queued job, and its progress."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from prefix_store.cli import watch
from prefix_store.cli.client import Client, checked, connect, fail
from prefix_store.cli.terminal import clock, printable

FIELDS = ("prompt", "completion")
EXPECTED = '{"prompt": "…", "completion": "…"}'
KINDS = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "a truth value", type(None): "null"}


def train(
    name: Annotated[str, typer.Option(help="What the prefix will be called.")],
    data: Annotated[
        Path, typer.Option(help='JSONL: one {"prompt": …, "completion": …} a line.', exists=True, dir_okay=False)
    ],
    method: Annotated[str | None, typer.Option(help="How it is tuned: prefix, prompt, or one plugged in.")] = None,
    virtual_tokens: Annotated[int | None, typer.Option(help="The prefix's length.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples a step.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same prefix.")] = None,
    init_text: Annotated[str | None, typer.Option(help="Text that the prefix starts from.")] = None,
    template: Annotated[str | None, typer.Option(help="Text with one {prompt}, in which every prompt stands.")] = None,
    wait: Annotated[bool, typer.Option(help="Show progress until the job has ended.")] = True,
) -> None:
    """Train a prefix on a running server's worker.

    The server has a default for every option that is not given.
    """
    options = {
        "method": method,
        "virtual_tokens": virtual_tokens,
        "steps": steps,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "seed": seed,
        "init_text": init_text,
        "template": template,
    }
    checked(name)
    given = {option: value for option, value in options.items() if value is not None}
    body = {"examples": read_examples(data), **given}
    with connect() as server:
        job = server.post(f"/v1/prefixes/{name}/train", json=body)["job"]
        typer.echo(printable(job["id"]))
        if wait:
            _finish(_watch(server, job))


def read_examples(path: Path) -> list[dict[str, str]]:
    """The examples of a JSONL file; blank lines are passed over. Ends the command with the line that is wrong."""
    examples = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            examples.append(_example(line, f"{path}, line {number}"))
    if not examples:
        fail(f"{path} has no examples")
    return examples


def _example(line: bytes, where: str) -> dict[str, str]:
    try:
        example = json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        fail(f"{where}: not JSON ({error.msg} at column {error.colno}); expected {EXPECTED}")
    except UnicodeDecodeError:
        fail(f"{where}: not UTF-8; expected {EXPECTED}")
    except (ValueError, RecursionError):  # thousands of digits, or of brackets
        fail(f"{where}: not JSON that can be read; expected {EXPECTED}")
    if not isinstance(example, dict) or set(example) != set(FIELDS):
        fail(f"{where}: expected an object {EXPECTED}, got {_kind(example)}")
    for field, text in example.items():
        if not isinstance(text, str):
            fail(f"{where}: {field} must be a string, got {_kind(text)}")
        if text != text.encode(errors="replace").decode():
            fail(f"{where}: {field} is not valid Unicode")
    if not example["completion"]:
        fail(f"{where}: the completion is empty")
    return example


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object with {', '.join(repr(name[:40]) for name in list(value)[:8]) or 'nothing'}"
    return KINDS[type(value)]


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
