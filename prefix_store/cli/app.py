"""The `antefix` command put together: its subcommands, in the order that a newcomer meets them."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from prefix_store.cli import (
    audit,
    compare,
    doctor,
    eval,
    generate,
    inspect,
    jobs,
    key,
    prefix,
    serve,
    store,
    tenant,
    train,
    verify,
)  # fmt: skip

# as a newcomer meets them
ORDER = (
    "serve", "generate", "compare", "train", "jobs", "eval", "prefix", "inspect", "verify", "worker", "key", "tenant",
    "audit", "store", "doctor",
)  # fmt: skip
HELP = """Serve, train and use tuned prefixes of one frozen language model.

\b
antefix serve --worker
antefix compare "Once upon a time" --prefix plays,carroll --bare
antefix train --name mine --data examples.jsonl
"""
EPILOG = (
    "serve, worker, key, tenant, audit, store and doctor open the store at ANTEFIX_STORE. "
    "The others speak to the server at ANTEFIX_URL, "
    "which is http://127.0.0.1:8000 if unset, with the key in ANTEFIX_API_KEY if there is one."
)


class _InOrder(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(ORDER)


def build() -> typer.Typer:
    """The command with its subcommands."""
    app = typer.Typer(
        cls=_InOrder,
        help=HELP,
        epilog=EPILOG,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.command()(serve.serve)
    app.command("worker")(serve.work)
    app.command()(generate.generate)
    app.command()(compare.compare)
    app.command()(train.train)
    app.add_typer(jobs.app, name="jobs")
    app.command("eval")(eval.evaluate)
    app.add_typer(prefix.app, name="prefix")
    app.command()(inspect.inspect)
    app.command()(verify.verify)
    app.add_typer(key.app, name="key")
    app.add_typer(tenant.app, name="tenant")
    app.command()(audit.audit)
    app.add_typer(store.app, name="store")
    app.command()(doctor.doctor)
    return app
