"""The code blocks of a page in `docs/`, for the tests that run them."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
ADDRESS = "http://127.0.0.1:8000"


def block(page: str, heading: str, language: str, url: str) -> str:
    """The only block in a language under a heading of the second level, with another server's address."""
    (code,) = re.findall(rf"^```{language}\n(.*?)^```", _section(page, heading), re.DOTALL | re.MULTILINE)
    found: str = code.replace(ADDRESS, url)
    return found


def code_headings(page: str) -> set[str]:
    """The headings under which there is a block of code in a language."""
    headings = re.findall(r"^## (.*)$", (DOCS / page).read_text("utf-8"), re.MULTILINE)
    return {heading for heading in headings if re.search(r"^```\w", _section(page, heading), re.MULTILINE)}


def _section(page: str, heading: str) -> str:
    text = (DOCS / page).read_text("utf-8")
    (section,) = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    found: str = section
    return found
