"""What comparisons of ways to tune a model have in common: runs that are kept, and our own training, timed."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from prefix_store.jobs import TrainingSpec
from prefix_store.model.frozen import FrozenModel
from tests.judging import nats_per_token
from tests.prove.paper import baselines
from trainer.data import Example, batches
from trainer.loop import fit

ABREAST = 2  # runs at a time, each with one thread
T = TypeVar("T")


class Runs:
    """What a module prints last of a run made in a process of its own, by all that decides it.

    A result depends on nothing else, so it is kept, as a line of a file among the results, and never made twice: a
    comparison of hours goes on where it was cut off, on any machine. Runs may be asked for from several threads.
    """

    def __init__(self, path: Path, module: str, *arguments: str) -> None:
        self._path = path
        self._command = [sys.executable, "-m", module, *arguments]
        self._lock = threading.Lock()
        lines = path.read_text().splitlines() if path.exists() else []
        self._kept = {_key(line["run"]): line["found"] for line in map(json.loads, lines)}

    def of(self, what: dict[str, Any]) -> dict[str, Any]:
        """The result of one run. Raises CalledProcessError if it fails."""
        with self._lock:
            kept: dict[str, Any] | None = self._kept.get(_key(what))
        if kept is not None:
            return kept
        done = subprocess.run([*self._command, json.dumps(what)], stdout=subprocess.PIPE, text=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        line = json.dumps({"run": what, "found": found}, ensure_ascii=False)
        with self._lock, self._path.open("a") as file:
            file.write(f"{line}\n")
            self._kept[_key(what)] = found
        return found


def abreast(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """What they return, in order, two at a time. The first that fails ends it, and none is begun after that."""
    pool = ThreadPoolExecutor(ABREAST)
    try:
        return [done.result() for done in [pool.submit(job) for job in jobs]]
    finally:
        pool.shutdown(cancel_futures=True)


def at_best_rate(
    run: Callable[[float, int], dict[str, Any]], rates: Sequence[float], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """A run a seed, at the learning rate that has the least dev loss with the first seed."""
    tried = {rate: run(rate, seeds[0]) for rate in rates}
    rate = min(tried, key=lambda rate: tried[rate]["loss"])
    return [tried[rate], *(run(rate, seed) for seed in seeds[1:])]


def _key(what: dict[str, Any]) -> str:
    return json.dumps(what, sort_keys=True)


def timed_fit(
    frozen: FrozenModel,
    method: Any,
    train: Sequence[Example],
    dev: Sequence[Example],
    spec: TrainingSpec,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Any, float]:
    """What training gives, and its seconds by `clock` without those of looking at `dev`."""
    looks: list[float] = []

    def validate() -> float:
        begun = clock()
        found = nats_per_token(frozen, method.rows, batches(dev, baselines.WRITTEN))
        looks.append(clock() - begun)
        return found

    begun = clock()
    result = fit(frozen, method, train, spec, validate=validate)
    return result, clock() - begun - sum(looks)
