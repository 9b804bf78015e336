"""Processes that publish until they are killed: `python -m … URL ROUNDS`. Prints every version they reported."""

import os
import random
import signal
import sys
import time

import torch

from prefix_store.store import Store
from tests.prefix_store.samples import manifest

torch.set_num_threads(1)  # a pool of threads does not live through a fork
KV = torch.zeros(2, 2, 2, 5000, 3)


def publish_for_ever(url: str, report: int) -> None:
    store = Store.open(url)
    while True:
        KV[0, 0, 0, 0] = time.time_ns() % 1_000_000
        long = manifest(virtual_tokens=5000, position_offset=5000)
        version = store.prefixes.save("acme", "support", long, {"self.kv": KV})
        os.write(report, f"{version.version}\n".encode())


def kill_one(url: str, after: int, seconds: float) -> None:
    """Starts a publisher and kills it some time after it has reported `after` versions."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        publish_for_ever(url, writing)
    os.close(writing)
    with os.fdopen(reading) as reports:
        for _ in range(after):
            print(reports.readline(), end="")
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        print(reports.read(), end="", flush=True)
    os.waitpid(child, 0)


def main(url: str, rounds: str) -> None:
    moment = random.Random(0)
    for _ in range(int(rounds)):
        kill_one(url, after=moment.randint(1, 3), seconds=moment.uniform(0.0, 0.03))


if __name__ == "__main__":
    main(*sys.argv[1:])
