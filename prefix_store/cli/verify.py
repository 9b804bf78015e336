"""`antefix verify`: proof, on the running server, that a row among others is the same request alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from prefix_store.cli.client import NOT_ANTEFIX, Failure, connect, reference
from prefix_store.cli.prefix import Ref
from prefix_store.cli.terminal import printable


def verify(ref: Ref) -> None:
    """Prove that a prefix in a mixed batch answers as it does alone and in transformers."""
    with connect() as server:
        found = server.post(f"{reference(ref)}/verify")
        try:
            text = "\n".join(_lines(found))
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
            raise Failure(f"{NOT_ANTEFIX}: {error}") from error
        typer.echo(printable(text))
    if found["ok"] is not True:
        raise typer.Exit(1)


def _lines(found: dict[str, Any]) -> Iterator[str]:
    prefix, neighbours = found["prefix"], ", ".join(found["neighbours"]) or "no other prefix"
    yield (
        f"{prefix['id']}@{prefix['version']} {prefix['digest'][:12]}: {found['tokens']} tokens behind "
        f"{found['prompts']} prompts, beside {found['rows_beside']} rows or more of {neighbours} and the bare model"
    )
    yield f"reference: {found['reference']}; {found['computed_with']}"
    for check in found["checks"]:
        ties = f", {check['near_ties']} near ties" if check["near_ties"] else ""
        yield (
            f"{_verdict(check)}  {check['name']}: {check['tokens_differ']} tokens differ{ties}; log-probabilities by "
            f"{check['max_logprob_difference']:.1e}, at most {check['tolerance']:.1e} is rounding"
        )
    for control in found["controls"]:
        yield (
            f"{_verdict(control)}  control, {control['name']}: log-probabilities by "
            f"{control['mean_logprob_difference']:.1e} on average, at least {control['at_least']:.1e} is needed"
        )
    if found["rows_beside"] == 0:
        yield "fail  no other row ran at the same time, so nothing is shown about mixed batches"
    yield "PASS" if found["ok"] is True else "FAIL"


def _verdict(part: dict[str, Any]) -> str:
    return "ok  " if part["ok"] is True else "fail"
