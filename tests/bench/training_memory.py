"""The peak memory of one arm of section `training`, which is measured in a process of its own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import warnings
from typing import Any

import torch
import transformers

from tests.bench.shapes import GPT2_SMALL
from tests.bench.training_arms import ARMS, Setup
from tests.bench.training_work import batch

STEPS = 2


def measure(arm: str, work: dict[str, Any]) -> dict[str, int]:
    """`peak_bytes` and `state_bytes` of an arm; `work`: numbers of `main`'s."""
    command = [sys.executable, "-m", "tests.bench.training_memory", json.dumps({"arm": arm, **work})]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arm: str, numbers: dict[str, int], virtual_tokens: int, rows: int, tokens: int, threads: int) -> None:
    """Two steps, and what they took; `numbers` change GPT-2 small's."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    shape = GPT2_SMALL.changed(**numbers)
    running = ARMS[arm](Setup(shape, virtual_tokens, users=1, learning_rate=1e-3))
    for number in range(STEPS):
        running.step([batch(shape.vocabulary, rows, tokens, seed=number)])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak_bytes": peak, "state_bytes": running.state_bytes()}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
