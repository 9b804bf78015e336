"""`antefix train`: examples to a queued job, and its progress."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from prefix_store.cli.client import Client, connect, fail
from prefix_store.jobs import JobStatus

POLL_SECONDS = 0.5
FINAL = frozenset(status for status in JobStatus if status.is_final)
FIELDS = {"prompt", "completion"}


def train(
    name: Annotated[str, typer.Option(help="What the prefix will be called.")],
    data: Annotated[
        Path, typer.Option(help='JSONL: one {"prompt": …, "completion": …} a line.', exists=True, dir_okay=False)
    ],
    virtual_tokens: Annotated[int | None, typer.Option(help="The prefix's length.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples a step.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same prefix.")] = None,
    init_text: Annotated[str | None, typer.Option(help="Text whose keys and values the prefix starts from.")] = None,
    wait: Annotated[bool, typer.Option(help="Show progress until the job has ended.")] = True,
) -> None:
    """Train a prefix on a running server's worker."""
    options = {
        "virtual_tokens": virtual_tokens,
        "steps": steps,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "seed": seed,
        "init_text": init_text,
    }
    examples = read_examples(data)
    with connect() as server:
        job = server.post(f"/v1/prefixes/{quote(name, safe='')}/train", json={"examples": examples, **options})["job"]
        typer.echo(job["id"])
        if wait:
            _finish(_follow(server, job))


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
        example = json.loads(line)
    except (ValueError, RecursionError):
        fail(f"{where}: not JSON")
    if not isinstance(example, dict) or set(example) != FIELDS:
        fail(f'{where}: expected an object with "prompt" and "completion"')
    if not all(isinstance(text, str) for text in example.values()):
        fail(f"{where}: prompt and completion must be strings")
    if not example["completion"]:
        fail(f"{where}: the completion is empty")
    return example


def _follow(server: Client, job: dict[str, Any]) -> dict[str, Any]:
    """The job once it has ended. Ctrl-C only ends the watching."""
    from rich.progress import BarColumn, Progress, TextColumn

    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[numbers]}")
    try:
        with Progress(*columns) as bar:
            shown = bar.add_task(job["status"], total=job["options"]["steps"], numbers="")
            while job["status"] not in FINAL:
                time.sleep(POLL_SECONDS)
                job = server.get(f"/v1/jobs/{job['id']}")
                step = job["progress"].get("step", 0)
                bar.update(shown, description=job["status"], completed=step, numbers=numbers(job))
    except KeyboardInterrupt:
        typer.echo(f"the job goes on; to cancel it: antefix jobs cancel {job['id']}", err=True)
        raise typer.Exit(130) from None
    return job


def numbers(job: dict[str, Any]) -> str:
    """Step, loss and time left, as far as they are known."""
    progress = job["progress"]
    if "step" not in progress:
        return "waiting for a worker: antefix worker" if job["status"] == "queued" else ""
    parts = [f"step {progress['step']}/{job['options']['steps']}"]
    if progress.get("train_loss") is not None:
        parts.append(f"loss {progress['train_loss']:.3f}")
    if progress.get("seconds_left") is not None:
        minutes, seconds = divmod(round(progress["seconds_left"]), 60)
        parts.append(f"{minutes}:{seconds:02} left")
    return "  ".join(parts)


def _finish(job: dict[str, Any]) -> None:
    name = job["prefix_id"]
    if job["status"] == "failed":
        fail(f"the job failed: {job['error']['message']}")
    if job["status"] == "cancelled":
        fail("the job was cancelled")
    typer.echo(f"{name}@{job['version']} is served; try: antefix generate --prefix {name} 'a prompt'")
