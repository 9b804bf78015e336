"""Which replica a request goes to: its prefix's home, the next in rank as the home takes more than its share.

Rendezvous hashing: each prefix ranks all replicas by a hash of both, so that a replica which comes or goes moves its
own prefixes only. A replica that has had more than a fair share of the running requests for a while counts for less,
and for nothing at `BOUND`; the prefixes that then move are those which were nearest to moving, and they stay moved.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from hashlib import blake2b

from prefix_store.errors import InvalidName
from prefix_store.prefix import PrefixRef

# At this many times its fair share a replica gets no prefix that has another replica to go to.
BOUND = 1.15
# How far one request moves the means: they look back over some two hundred.
PACE = 0.005
# Requests that every replica is taken to have beside those it has, so that a few alone are no load.
SLACK = 2.0
# The routes that generate, and the field of their bodies that names a prefix.
NAMED_BY = {
    path: re.compile(rb'"%s"\s*:\s*"([^"\\]{1,200})"' % field)
    for path, field in {
        "/generate": b"prefix_id",
        "/v1/completions": b"model",
        "/v1/chat/completions": b"model",
    }.items()
}
ABOUT_ONE = re.compile(r"/v1/prefixes/(.+)/(?:preload|release|verify|inspect)")


class Ranking:
    """The order in which replicas are tried; `rows` is how many requests one runs at the same time."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._means: dict[str, float] = {}
        self._asked = 0

    def order(self, key: str | None, loads: Mapping[str, int], avoided: Collection[str] = ()) -> list[str]:
        """Names of replicas, best first, where `loads` says how many requests each has.

        Those to avoid come last, before them those whose batch is full. Without a key the least loaded is first.
        """
        self._asked += 1
        self._means = {name: _moved(self._means.get(name, 0.0), load) for name, load in loads.items()}
        if key is None:
            ranked = sorted(loads, key=lambda name: (loads[name], _hash(str(self._asked), name)))
        else:
            weights = self._weights()
            ranked = sorted(loads, key=lambda name: -math.log(_hash(key, name)) / weights[name])
        return sorted(ranked, key=lambda name: (name in avoided, loads[name] >= self._rows))

    def _weights(self) -> dict[str, float]:
        """1 up to the fair share, falling to nearly nothing at the bound."""
        fair = sum(self._means.values()) / len(self._means) + SLACK
        shares = {name: (mean + SLACK) / fair for name, mean in self._means.items()}
        return {name: min(1.0, max(1e-6, (BOUND - share) / (BOUND - 1))) for name, share in shares.items()}


def key_of(path: str, body: bytes, tenant: str, model: str) -> str | None:
    """The prefix that a request is about, versions aside; None for none, or the base model.

    The body is searched, not parsed: a wrong find costs a detour, and nothing else.
    """
    if path in NAMED_BY:
        found = NAMED_BY[path].search(body)
        text = found[1].decode(errors="replace") if found else model
    else:
        about = ABOUT_ONE.fullmatch(path)
        text = about[1] if about else model
    if text == model:
        return None
    try:
        ref = PrefixRef.parse(text, tenant)
    except InvalidName:
        return None
    return f"{ref.tenant}/{ref.name}"


def _moved(mean: float, load: int) -> float:
    return mean + PACE * (load - mean)


def _hash(key: str, name: str) -> float:
    """From 0 to 1, without the 0."""
    digest = blake2b(f"{key}\0{name}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") + 1) / (1 << 64)
