"""`antefix inspect`: what is in a prefix, as the server's model sees it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer

from prefix_store.cli.client import NOT_ANTEFIX, Failure, connect, reference
from prefix_store.cli.prefix import Ref
from prefix_store.cli.terminal import printable

ABSENT = "-"


def inspect(
    ref: Ref,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="A text to measure attention and importance on. May be repeated: ten tell more than one."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the server's whole reply.")] = False,
) -> None:
    """Show a prefix's nearest words, norms and the attention it gets."""
    with connect() as server:
        found = server.get(f"{reference(ref)}/inspect", prompt=prompt or None)
        try:
            text = json.dumps(found, indent=2) if as_json else "\n".join(_lines(found))
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
            raise Failure(f"{NOT_ANTEFIX}: {error}") from error
        typer.echo(text if as_json else printable(text))


def _lines(found: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{found['id']}@{found['version']}  {found['method']}, {found['virtual_tokens']} virtual tokens, "
        f"{found['digest'][:12]}; by {found['computed_with']}"
    )
    if found["tokens"]:
        yield ""
        yield from _table(["token", "share", "importance", "rank", "nearest words"], map(_token, found["tokens"]))
    yield ""
    if any("memory_norms" in layer for layer in found["layers"]):
        yield from _table(["layer", "norm of each head's memory"], map(_memory, found["layers"]))
    else:
        attention = found["attention"]
        rows = [_layer(layer, attention and attention["layers"][layer["layer"]]) for layer in found["layers"]]
        yield from _table(["layer", "keys", "values", "share", "last token's", "share of each head"], rows)
    for what, why in found["absent"].items():
        yield f"no {what}: {why}"


def _token(token: dict[str, Any]) -> list[str]:
    words = "  ".join(f"{_quoted(near['token'])} {near['score']:.2f}" for near in token["nearest"])
    importance, rank = token["importance"], token["rank"]
    told = f"{importance:+.4f}" if importance is not None else ABSENT
    return [str(token["index"]), _percent(token["share"]), told, ABSENT if rank is None else str(rank), words]


def _layer(layer: dict[str, Any], attention: dict[str, Any] | None) -> list[str]:
    """Norms are means over the virtual tokens."""
    heads, last = (attention["heads"], attention["last_token_heads"]) if attention else ([], [])
    shares = [_percent(_mean(heads)), _percent(_mean(last))] if heads else [ABSENT, ABSENT]
    norms = [f"{_mean(layer[name]):.2f}" for name in ("key_norms", "value_norms")]
    return [str(layer["layer"]), *norms, *shares, " ".join(map(_percent, heads))]


def _memory(layer: dict[str, Any]) -> list[str]:
    return [str(layer["layer"]), " ".join(f"{norm:.2f}" for norm in layer["memory_norms"])]


def _table(titles: Sequence[str], rows: Iterator[list[str]] | Sequence[list[str]]) -> Iterator[str]:
    """Columns to the right, but for the last."""
    shown = [list(titles), *rows]
    widths = [max(len(row[column]) for row in shown) for column in range(len(titles) - 1)]
    for row in shown:
        yield "  ".join([*(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()


def _quoted(word: str) -> str:
    """In quotes, on one line: words begin with blanks, and some are line breaks."""
    return json.dumps(word, ensure_ascii=False)


def _percent(share: float | None) -> str:
    return ABSENT if share is None else f"{100 * share:.1f}%"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
