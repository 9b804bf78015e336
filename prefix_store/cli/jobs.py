"""`antefix jobs`: training jobs of a running server."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from prefix_store.cli import plot, watch
from prefix_store.cli.client import connect, fail
from prefix_store.cli.terminal import printable


class _IdShows(TyperGroup):
    """`antefix jobs ID` is `antefix jobs show ID`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args[0] in self.commands else ["show", *args])


app = typer.Typer(
    cls=_IdShows,
    help="Training jobs: listed if alone; show ID (or just ID), report ID, pause ID, resume ID, cancel ID.",
    invoke_without_command=True,
)
ASKED = {"cancel_requested": "cancelling", "pause_requested": "pausing"}  # what a running job will soon be
JobId = Annotated[str, typer.Argument(metavar="ID", help="ftjob-…, as `antefix jobs` lists them")]


@app.callback()
def list_all(context: typer.Context) -> None:
    """List the jobs, newest first, when no command is given."""
    if context.invoked_subcommand is None:
        with connect() as server:
            for job in server.pages("/v1/jobs"):
                typer.echo(line(job))


@app.command()
def show(job_id: JobId) -> None:
    """Show one job as JSON."""
    with connect() as server:
        typer.echo(json.dumps(server.get(_path(job_id)), indent=2))


@app.command()
def cancel(job_id: JobId) -> None:
    """Cancel a job: a queued one at once, a running one within seconds."""
    with connect() as server:
        typer.echo(line(server.post(f"{_path(job_id)}/cancel")))


@app.command()
def report(
    job_id: JobId,
    png: Annotated[Path | None, typer.Option(help="Draw the loss curves into this file.")] = None,
) -> None:
    """Show how a job went as JSON: curves, what was chosen for it, answers before and after."""
    if png is not None:
        plot.check_installed()
    with connect() as server:
        found = server.get(f"{_path(job_id)}/report")
        if png is not None:
            plot.draw(found, png)
    typer.echo(json.dumps(found, indent=2))


@app.command()
def pause(job_id: JobId) -> None:
    """Let a job rest: a queued one at once, a running one within seconds. It keeps what it has learnt."""
    with connect() as server:
        typer.echo(line(server.post(f"{_path(job_id)}/pause")))


@app.command()
def resume(job_id: JobId) -> None:
    """Let a paused job go on where it stood."""
    with connect() as server:
        typer.echo(line(server.post(f"{_path(job_id)}/resume")))


def _path(job_id: str) -> str:
    """Where a job is over HTTP. What can be no id is refused here, for `..` would lead elsewhere."""
    if not re.fullmatch(r"ftjob-[A-Za-z0-9]+", job_id):
        fail(f"a job's id begins with ftjob-, got {job_id[:80]!r}; `antefix jobs` lists them")
    return f"/v1/jobs/{job_id}"


def line(job: dict[str, Any]) -> str:
    """A job in one line."""
    progress = job["progress"]
    parts = [job["id"], job["prefix_id"], job["status"]]
    if progress.get("step"):
        parts.append(f"step {progress['step']} of {progress.get('total_steps') or job['options']['steps']}")
        parts += watch.figures(progress) if job["status"] == "running" else []
    if job["version"]:
        parts.append(f"{job['prefix_id']}@{job['version']}")
    if job["error"]:
        parts.append(f"{job['error']['code']}: {job['error']['message']}")
    if job["status"] == "running":
        parts += [word for flag, word in ASKED.items() if job.get(flag)][:1] + watch.silence(job)
    return printable("\t".join(parts))
