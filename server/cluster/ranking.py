"""Which replica a request goes to: its prefix's home, or the next in rank where the home has had more than its share.

Rendezvous hashing: each prefix ranks all replicas by a hash of both names, so that a replica which comes or goes moves
its own prefixes only.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from hashlib import blake2b

# A replica has no more than its share while its requests, lately, are no more than the mean, times this, and so many.
BOUND, SLACK = 1.15, 1.0
# How far one request moves what is lately: it looks back over some hundred, for chance alone must not move prefixes.
PACE = 0.01
# Of the requests that run now a replica may have so many times the mean, and so many more, until lately has caught up.
BURST_BOUND, BURST_SLACK = 1.5, 4.0
# The routes that generate, and the field of their bodies that names a prefix.
NAMED_BY = {
    path: re.compile(rb'"%s"\s*:\s*"([^"\\]{1,200})"' % field)
    for path, field in {
        "/generate": b"prefix_id",
        "/v1/completions": b"model",
        "/v1/chat/completions": b"model",
    }.items()
}
AT_HOME = re.compile(r"/v1/prefixes/(.+)/(?:preload|release)")


def key_of(path: str, body: bytes) -> str | None:
    """The name of the prefix that a request is about, without its owner and version; None for none.

    The body is searched, not parsed: a wrong find costs a detour, and nothing else.
    """
    if path in NAMED_BY:
        found = NAMED_BY[path].search(body)
        text = found[1].decode(errors="replace") if found else ""
    else:
        about = AT_HOME.fullmatch(path)
        text = about[1] if about else ""
    return text.rpartition("/")[2].partition("@")[0] or None


class Ranking:
    """Remembers how many requests each replica has had lately."""

    def __init__(self) -> None:
        self._lately: dict[str, float] = {}

    def choose(self, key: str | None, loads: Mapping[str, int], avoided: Collection[str] = ()) -> str:
        """The name of a replica, none of those to avoid, where `loads` says how many requests each has.

        Without a key it is the one with the fewest.
        """
        before = self._lately
        self._lately = {
            name: before.get(name, 0.0) + PACE * (load - before.get(name, 0.0)) for name, load in loads.items()
        }
        most = BOUND * sum(self._lately.values()) / len(loads) + SLACK
        most_now = BURST_BOUND * sum(loads.values()) / len(loads) + BURST_SLACK
        left = sorted(loads.keys() - set(avoided), key=lambda name: _hash(key, name))
        fewest = min(left, key=lambda name: loads[name])
        if key is None:
            return fewest
        return next((name for name in left if self._lately[name] <= most and loads[name] <= most_now), fewest)


def _hash(key: str | None, name: str) -> bytes:
    return blake2b(f"{key}\0{name}".encode(), digest_size=8).digest()
