"""Each bundled prefix against the bare model and against every other one, on text that neither ever saw."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.prove.bundled import Bench, data_folder
from trainer.bundled import prefix_data
from trainer.data import Example, tokenize

SECTION = "prefixes"
NONE = "none"


def run() -> dict[str, Any]:
    """Bits per byte of every prefix's held-out rows under every prefix and none, by the serving engine."""
    bench = Bench()
    with tempfile.TemporaryDirectory() as folder:
        prefix_data.write(data_folder(), Path(folder))
        rows = {prefix.name: _rows(Path(folder) / prefix.name) for prefix in prefix_data.PREFIXES}
    payloads = {**bench.prefixes(), NONE: None}
    matrix = {}
    for text, held_out in rows.items():
        examples = _without_end(tokenize(bench.model.tokenizer, held_out, bench.model.context_length))
        size = sum(len(row["completion"].encode()) for row in held_out)
        matrix[text] = {
            name: sum(bench.nats(examples, [payload] * len(examples))) / math.log(2) / size
            for name, payload in payloads.items()
        }
    facts = {
        name: {"method": "prompt" if payload.is_embeds else "prefix", "virtual_tokens": payload.virtual_tokens}
        for name, payload in payloads.items()
        if payload is not None
    }
    return {"bits": matrix, "facts": facts, "rows": {name: len(held_out) for name, held_out in rows.items()}}


def own_is_best(matrix: dict[str, dict[str, float]]) -> bool:
    """Whether every text is told best by its own prefix."""
    return all(min(row, key=row.__getitem__) == text for text, row in matrix.items())


def missed(measured: dict[str, Any]) -> list[str]:
    """The bars that were not reached."""
    return [] if own_is_best(measured["bits"]) else ["every text is told best by its own prefix"]


def table(measured: dict[str, Any]) -> str:
    """Texts down, prefixes across; a text's best is bold."""
    matrix: dict[str, dict[str, float]] = measured["bits"]
    names = list(matrix)
    lines = [
        _line(["held-out text of", "method, P", "with none", *(f"`{name}`" for name in names)]),
        _line(["---"] * (3 + len(names))),
    ]
    for text, row in matrix.items():
        facts, best = measured["facts"][text], min(row.values())
        cells = [f"**{row[name]:.3f}**" if row[name] == best else f"{row[name]:.3f}" for name in (NONE, *names)]
        lines.append(_line([f"`{text}`", f"{facts['method']}, {facts['virtual_tokens']}", *cells]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _without_end(examples: Sequence[Example]) -> list[Example]:
    """Where a row ends is our cut and no part of the text, but a prefix learns it."""
    return [dataclasses.replace(example, ids=example.ids[:-1]) for example in examples]


def _rows(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "dev.jsonl").read_text("utf-8").splitlines()]
