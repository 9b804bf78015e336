"""What a long measurement says while it runs: one line an event, with the seconds since the process began."""

from __future__ import annotations

import time

_BEGUN = time.perf_counter()


def say(text: str) -> None:
    """Prints a line at once."""
    print(f"{time.perf_counter() - _BEGUN:7.1f} s  {text}", flush=True)
