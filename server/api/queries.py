"""Parameters of an address: none but those a route knows, and those whose names are the caller's own."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import Request

from prefix_store.errors import InvalidRequest
from server.api import hints

METADATA = "metadata."


def only_known(request: Request) -> None:
    """Raises InvalidRequest for a parameter that the route does not name, which would otherwise be ignored."""
    known = [parameter.alias for parameter in request.scope["route"].dependant.query_params]
    for name in request.query_params:
        if name not in known:
            raise _unknown(name, known)


def metadata(request: Request, known: Sequence[str]) -> dict[str, str]:
    """The `metadata.KEY=VALUE` among a request's parameters.

    Raises InvalidRequest for one that is neither that nor known: a misspelt filter would let everything through.
    """
    found: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name.startswith(METADATA):
            key = name.removeprefix(METADATA)
            if not key or key in found:
                raise InvalidRequest(f"{METADATA}KEY needs a key, each once; got {name[:80]!r}", param=name[:80])
            found[key] = value
        elif name not in known:
            raise _unknown(name, (*known, METADATA + "KEY"))
    return found


def _unknown(name: str, known: Sequence[str]) -> InvalidRequest:
    takes = f"takes {', '.join(known)}" if known else "takes none"
    hint = hints.nearest(name, known) or f"; this route {takes}"
    return InvalidRequest(f"unknown parameter {name[:80]!r}{hint}", param=name[:80])
