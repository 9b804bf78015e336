"""What a run consists of, the most wanted first, and how long each piece may take."""

from __future__ import annotations

import faulthandler
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from tests.bench.gpu import checks, contest, decode, together
from tests.bench.gpu.aims import holds
from tests.bench.gpu.sizes import Setup, Size

GRACE_SECONDS = 20  # for what is deep in a library; then the process ends, and another goes on


class OutOfTime(BaseException):
    """A piece has had its seconds."""


@dataclass(frozen=True)
class Piece:
    """Its results come one by one, each with a name."""

    name: str
    seconds: float
    run: Callable[[Setup], Iterator[tuple[str, dict[str, Any]]]]


def all_of(size: Size) -> list[Piece]:
    """In the order in which they run. All limits together are more than there is: few pieces need theirs."""
    decoding = size.decoding
    long = [one for one in decoding if holds(one.shape, size.virtual_tokens[1], size)]
    return [
        Piece("copy rate", 20, _copy_rate),
        Piece("check: float32 against transformers", 70, checks.parity),
        Piece("check: attention against plain", 60, checks.backend),
        Piece("check: bfloat16 against float32", 50, checks.half),
        Piece("check: the same bits", 20, checks.same_bits),
        *(Piece(f"decode: {one.shape.name}", 80, partial(decode.goals, decoding=one)) for one in decoding),
        *(Piece(f"long prefix: {one.shape.name}", 60, partial(decode.shared, decoding=one)) for one in long),
        Piece("kernel alone", 30, decode.kernel),
        Piece("training together", 60, together.together),
        *(Piece(f"contest: {shape.name}", 70, partial(contest.contest, shape=shape)) for shape in size.contests),
        *(Piece(f"others: {one.shape.name}", 90, partial(decode.others, decoding=one)) for one in decoding),
    ]


def _copy_rate(setup: Setup) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "copy rate", {"gb_per_second": round(setup.copy_rate / 1e9, 1)}


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in what takes longer; what does not hear of it ends the process."""

    def late(*_: Any) -> None:
        raise OutOfTime(f"longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(seconds + GRACE_SECONDS, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
