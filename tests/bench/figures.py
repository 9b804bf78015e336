"""Measured figures in README and docs, generated from `docs/results`: `python -m tests.bench.figures [--check]`."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from tests.bench import results
from tests.bench.gpu import table as gpu
from tests.bench.sections import SECTIONS
from tests.prove.proofs import PROOFS

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
SHOWN = SECTIONS | PROOFS | {gpu.SECTION: gpu}
BLOCK = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)


def rendered(text: str, others: str = "") -> str:
    """A page with every marked block filled from its results file; one that was never measured says so or is empty.

    Raises SystemExit if a measured section has no block here or in the text of the `others`.
    """
    blocks = {match[2] for match in BLOCK.finditer(text + others)}
    missing = [name for name in SHOWN if results.path(name).exists() and name not in blocks]
    if missing:
        sys.exit(f"no block for the figures of {', '.join(sorted(missing))}")
    return BLOCK.sub(lambda match: match[1] + _figures(match[2]) + match[3], text)


def _figures(section: str) -> str:
    if not results.path(section).exists():
        return getattr(SHOWN[section], "UNMEASURED", "")
    measured = results.read(section)
    conditions = measured["conditions"]
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items())
    machine = conditions.get("gpu") or f"{conditions['cpu']}, {conditions['threads']} threads"
    note = f"{machine}; {versions}; commit {conditions['commit'] or conditions['sources']}."
    return f"{SHOWN[section].table(measured)}\n\n{note}\n"


def main() -> None:
    """Rewrites the pages, or with --check only says whether they are up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    texts = {page: page.read_text() for page in PAGES}
    for page, text in texts.items():
        new = rendered(text, "".join(texts.values()))
        if check and new != text:
            sys.exit(f"{page.name}: the figures differ from docs/results; run python -m tests.bench.figures")
        if not check:
            page.write_text(new)


if __name__ == "__main__":
    main()
