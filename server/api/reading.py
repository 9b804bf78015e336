"""The first look at a JSON body: every name once, and no more in it than can be read while others wait.

Whoever holds Python's lock holds up every other call, and a parser holds it until it is done. This one lets others in
at every object and number; it refuses what would take the next one long.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from prefix_store.errors import InvalidRequest

# Objects and numbers in a body, and the marks of lists and texts, which are not counted one by one.
MOST_VALUES, MOST_LISTS, MOST_QUOTES = 1_000_000, 4_000_000, 16_000_000


def look_through(body: bytes) -> None:
    """Raises InvalidRequest for too many values, and for a name given twice.

    Of two the last would win, and a second prefix_id would count.
    """
    if body.count(b"[") > MOST_LISTS or body.count(b'"') > MOST_QUOTES:
        raise _too_many()
    seen = 0

    def count(text: str = "") -> int:
        nonlocal seen
        seen += 1
        if seen > MOST_VALUES:
            raise _too_many()
        return 0

    def check(pairs: list[tuple[str, Any]]) -> int:
        names = [name for name, _ in pairs]
        if len(names) != len(set(names)):
            twice = next(name for name in names if names.count(name) > 1)[:80]
            raise InvalidRequest(f"the field {twice!r} is given more than once", param=twice)
        return count()  # not the object: nobody needs it, and it would take room

    # what is not JSON at all, or too deep, is pydantic's to explain
    with suppress(ValueError, RecursionError):
        json.loads(body, object_pairs_hook=check, parse_int=count, parse_float=count)


def _too_many() -> InvalidRequest:
    return InvalidRequest(f"the body has more than {MOST_VALUES:,} values")
