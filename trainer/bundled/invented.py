"""Invented names: no list of them exists, so a reader can know one only from the text before it.

A name is either for training or held out, by its own checksum: a name that is held out is never trained on as a whole,
whatever the seed, though its words may be part of others. What everything is drawn from is in `records.toml`.
"""

from __future__ import annotations

import random
import re
import tomllib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

HELD_OUT_ONE_IN = 8
TABLES: dict[str, Any] = tomllib.loads(Path(__file__).with_name("records.toml").read_text("utf-8"))
LISTS: dict[str, list[str]] = {name: words.split() for name, words in TABLES["lists"].items()}
PATTERNS: dict[str, list[str]] = TABLES["patterns"]
T = TypeVar("T")
GAP = re.compile(r"\{([^{}]+)\}")
NUMBER = re.compile(r"(\d+)\.\.(\d+)(:\w+)?")


@dataclass(frozen=True)
class Names:
    """Draws names of one side of the held-out line."""

    draws: random.Random
    held_out: bool = False

    def one(self, items: Sequence[T]) -> T:
        """Any of these."""
        return items[int(self.draws.random() * len(items))]

    def some(self, pattern: str, count: int) -> list[str]:
        """So many different ones."""
        found: dict[str, None] = {}
        while len(found) < count:
            found[self.fill(pattern)] = None
        return list(found)

    def fill(self, pattern: str | Sequence[str]) -> str:
        """One pattern, or any of several, with its gaps filled.

        A gap is a sort of name (`{town}`), a list (`{goods}`), a choice (`{a|b}`) or a number (`{1..9}`, `{0..99:02}`).
        """
        if not isinstance(pattern, str):
            pattern = self.one(pattern)
        return GAP.sub(lambda gap: self._gap(gap[1]), pattern)

    def _gap(self, gap: str) -> str:
        if gap in SORTS:
            return self._on_this_side(SORTS[gap])
        if gap == "syllables":
            return self._syllables()
        if number := NUMBER.fullmatch(gap):
            return format(self.draws.randint(int(number[1]), int(number[2])), (number[3] or ":")[1:])
        return self.one(LISTS[gap] if gap in LISTS else gap.split("|"))

    def _on_this_side(self, make: Callable[[Names], str]) -> str:
        while is_held_out(name := make(self)) != self.held_out:
            pass
        return name

    def _syllables(self) -> str:
        middle = self.one(LISTS["middles"]) if self.draws.random() < 0.35 else ""
        return (self.one(LISTS["openings"]) + middle + self.one(LISTS["endings"])).capitalize()

    def _person(self) -> str:
        if self.draws.random() < 0.7:
            return f"{self.one(LISTS['first_names'])} {self._syllables()}"
        return self._syllables()

    def _way(self) -> str:
        called = self.one((self._syllables(), self.one(LISTS["emblems"])))
        return f"{called} {self.one(LISTS['ways'])}"


def is_held_out(name: str) -> bool:
    """One name in eight."""
    return zlib.crc32(name.encode()) % HELD_OUT_ONE_IN == 0


SORTS: dict[str, Callable[[Names], str]] = {
    "word": Names._syllables,  # Marwick, Delanora
    "person": Names._person,  # Edith Calford, or one name alone
    "way": Names._way,  # Belford Street, Silver Lane
    "sign": lambda names: names.fill(PATTERNS["sign"]),  # what stands above a door: The Rusty Anchor, Tolbrick House
    "town": lambda names: names.fill(PATTERNS["town"]),  # Orwell, New Fendale
}
