"""The page of methods names every method, and every option with the default that it has."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from prefix_store.jobs import BUILT_IN_METHODS, DEFAULTS, METHODS_WITH, Objective, TrainingSpec

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text("utf-8")
ROWS = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*) \|$", PAGE[PAGE.index("## Options") :], re.MULTILINE)
GENERAL = {
    "method",
    "objective",
    "steps",
    "epochs",
    "batch_size",
    "max_length",
    "template",
    "seed",
    "patience",
    "publish_anyway",
    "examples",
    "data_digest",
}
NO_OPTIONS = {"base_digest", "chat_template", "validation_examples", "unset"}  # what the server fills in


def test_every_method_has_its_part():
    headings = " ".join(re.findall(r"^## (.*)$", PAGE, re.MULTILINE))
    assert [name for name in BUILT_IN_METHODS if f"`{name}`" not in headings] == []
    assert [objective for objective in Objective if f"**`{objective}`**" not in PAGE] == []


def test_every_option_stands_there_with_its_default():
    fields = {field.name: field.default for field in dataclasses.fields(TrainingSpec)}
    assert {name for name, *_ in ROWS} == set(fields) - GENERAL - NO_OPTIONS
    for name, default, _, _ in ROWS:
        assert default.strip("`") == ("none" if fields[name] is None else str(fields[name])), name


def test_every_option_stands_there_with_its_methods():
    for name, _, whose, _ in ROWS:
        having = METHODS_WITH.get(name, BUILT_IN_METHODS)
        missing = [f"`{method}`" for method in BUILT_IN_METHODS if method not in having]
        if whose.startswith("all but"):
            assert whose == f"all but {', '.join(missing)}"
        elif not whose.startswith(("all", "objective")):
            assert whose == ", ".join(f"`{method}`" for method in having)


def test_a_method_s_own_defaults_are_said():
    for method, defaults in DEFAULTS.items():
        for name, value in defaults.items():
            if name != "virtual_tokens":
                row = next(row for row in ROWS if row[0] == name)
                assert re.search(rf"\b{value} for [^;.]*`{method}`", row[3]), (method, name)
