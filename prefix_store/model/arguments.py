"""What transformers hands an attention function beside queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Of no bearing on the result here: masks and positions are explicit, and nothing is cached.
_IGNORED = frozenset({"dropout", "position_ids", "cache_position", "use_cache", "output_attentions", "is_causal"})


def strange(arguments: Mapping[str, Any]) -> list[str]:
    """Names of the arguments that are given and that could change the result in a way nobody here knows."""
    given = {name for name, value in arguments.items() if value is not None and value is not False}
    return sorted(given - _IGNORED)
