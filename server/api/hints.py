"""What a misspelt name was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 80


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'steps'?` where a known name is near; nothing where none is, for a far one would mislead."""
    found = difflib.get_close_matches(name[:LONGEST], list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""
