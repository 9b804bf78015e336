"""One thing that was looked at, how it is, and what to do if it is not well."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad it is: a problem is what fails, a warning is what may, or costs something."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """`text` is for people, and has no secret in it."""

    level: Level
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.level}: {self.subject}: {self.text}"


def ok(subject: str, text: str) -> Finding:
    """All is well with it."""
    return Finding(Level.OK, subject, text)


def warning(subject: str, text: str) -> Finding:
    """It works, and something should be done."""
    return Finding(Level.WARNING, subject, text)


def problem(subject: str, text: str) -> Finding:
    """It does not work until something is done."""
    return Finding(Level.PROBLEM, subject, text)
