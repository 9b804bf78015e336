"""Parameters of an address whose names are the caller's own: `metadata.KEY=VALUE`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from fastapi import Request

from prefix_store.errors import InvalidRequest

METADATA = "metadata."


def metadata(request: Request, known: Sequence[str]) -> dict[str, str]:
    """The metadata among a request's parameters. Raises InvalidRequest for one that is neither that nor known.

    A misspelt filter would otherwise let everything through.
    """
    found: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name.startswith(METADATA):
            key = name.removeprefix(METADATA)
            if not key or key in found:
                raise InvalidRequest(f"{METADATA}KEY needs a key, each once; got {name[:80]!r}", param=name[:80])
            found[key] = value
        elif name not in known:
            near = difflib.get_close_matches(name[:80], (*known, METADATA + "KEY"), n=1, cutoff=0.0)[0]
            raise InvalidRequest(f"unknown parameter {name[:80]!r}; did you mean {near!r}?", param=name[:80])
    return found
