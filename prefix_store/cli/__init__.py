"""The `antefix` command. Commands about work speak HTTP to a server; commands about the store open it."""

from __future__ import annotations

import typer

from prefix_store.cli import generate, jobs, key, prefix, serve, train


def build() -> typer.Typer:
    """The command with its subcommands."""
    app = typer.Typer(
        help="Serve, train and use tuned prefixes of one frozen language model.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.command()(serve.serve)
    app.command("worker")(serve.work)
    app.command()(train.train)
    app.command()(generate.generate)
    app.add_typer(jobs.app, name="jobs")
    app.add_typer(prefix.app, name="prefix")
    app.add_typer(key.app, name="key")
    return app


def main() -> None:
    """The entry point."""
    build()()
