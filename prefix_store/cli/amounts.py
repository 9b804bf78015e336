"""Amounts as people write them: `30d`, `2G`, `team=sales`."""

from __future__ import annotations

import re
from collections.abc import Sequence

import typer

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
BYTES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
NONE = "none"


def seconds(text: str) -> float:
    """`90s`, `15m`, `24h`, `30d` or `2w`."""
    found = re.fullmatch(r"([0-9]{1,6})([smhdw])", text.strip())
    if found is None or int(found[1]) == 0:
        raise typer.BadParameter(f"expected a time such as 90s, 15m, 24h, 30d or 2w, got {text!r}")
    return float(int(found[1]) * SECONDS[found[2]])


def bound(text: str) -> int | str:
    """A natural number, also as `2G`, or `none`."""
    found = re.fullmatch(r"([0-9]{1,12})([KMGT]?)i?B?", text.strip())
    if found is None and text != NONE:
        raise typer.BadParameter(f"expected a number, such as 20 or 2G, or {NONE}, got {text!r}")
    return int(found[1]) * BYTES[found[2]] if found is not None else NONE


def pairs(texts: Sequence[str]) -> dict[str, str]:
    """`KEY=VALUE` by key."""
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise typer.BadParameter(f"expected KEY=VALUE, got {text!r}")
        found[key] = value
    return found


def size(count: int) -> str:
    """Bytes, for people to read."""
    left, units = float(count), ["B", "KB", "MB", "GB", "TB"]
    while left >= 1000 and len(units) > 1:
        left /= 1000
        units.pop(0)
    return f"{left:.3g} {units[0]}"


def counted(count: int, what: str) -> str:
    """`1 key`, `2 keys`, `2 prefixes`."""
    many = f"{what}es" if what.endswith("x") else f"{what}s"
    return f"{count} {what if count == 1 else many}"
