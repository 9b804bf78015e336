"""What a GPU is meant to reach: every goal by its name, whether anything was measured or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tests.bench import goals, peers
from tests.bench.gpu.sizes import Decoding, Size
from tests.bench.shapes import Shape

MIXED, DISTINCT, COPIES = 0.95, 0.97, 3.0
CONTESTANTS = {peers.SWITCHED: 30.0, peers.GROUPED: 10.0, peers.CONTINUOUS: 2.0}
TRAINING = 8.0


def share(decoding: Decoding) -> str:
    """Decoded tokens a second, of what the bytes that must be moved allow."""
    return f"{decoding.shape.name}: share of the bytes-moved ideal, B={decoding.rows}"


def mixed(decoding: Decoding) -> str:
    """Prefixes, each of several rows or of one, against the same rows without."""
    return f"{decoding.shape.name}: mixed prefixes against none, B={decoding.rows}"


def distinct(decoding: Decoding, size: Size) -> str:
    """Many prefixes against one."""
    return f"{decoding.shape.name}: {size.distinct[1]} distinct prefixes against 1, B={decoding.rows}"


def copies(shape: Shape, size: Size) -> str:
    """A long prefix that is read once against a copy of it for every row."""
    return f"{shape.name}: one prefix of {size.virtual_tokens[1]:,} against a copy a request, B={size.rows[0]}"


def against(shape: Shape, name: str) -> str:
    """A contestant of the workload."""
    return f"{shape.name}: {name}"


def training(size: Size) -> str:
    """Users who train together against one after another."""
    return f"{size.trained.name}: prefixes of {size.users} users trained together against PEFT one by one"


def all_of(size: Size) -> Iterator[tuple[str, float]]:
    """Every goal: its name, and the least that is good enough."""
    for decoding in size.decoding:
        yield share(decoding), decoding.share
        yield mixed(decoding), MIXED
        yield distinct(decoding, size), DISTINCT
        if holds(decoding.shape, size.virtual_tokens[1], size):
            yield copies(decoding.shape, size), COPIES
    for shape in size.contests:
        for name, least in CONTESTANTS.items():
            yield against(shape, name), least
    yield training(size), TRAINING


def holds(shape: Shape, virtual_tokens: int, size: Size) -> bool:
    """Whether a model has positions for a prefix and what is decoded behind it."""
    positions = shape.numbers.get("n_positions") or shape.numbers["max_position_embeddings"]
    return virtual_tokens + 2 * size.own <= int(positions or 0)


def judged(size: Size, results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, goals.Goal | None]:
    """Each goal with what was measured of it, and whether that is enough; None where nothing was."""
    measured: dict[str, float] = {}
    for piece in results.values():
        for found in piece.values():
            measured.update(found.get("reached", {}))
    return {name: goals.at_least(measured[name], least) if name in measured else None for name, least in all_of(size)}
