"""Asks a server for its health, again and again, from a process of its own: `python health.py PORT`.

Ends with its standard input, and prints how many seconds each answer took.
"""

from __future__ import annotations

import http.client
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.e2e.processes import ROOT, Running

PAUSE = 0.01
MEDIAN_SECONDS, WORST_SECONDS = 0.1, 1.0


@contextmanager
def watched(server: Running) -> Iterator[list[float]]:
    """The answers' seconds, once the block has ended, which must be few."""
    seconds: list[float] = []
    command = [sys.executable, "-m", "tests.e2e.health", str(server.client.base_url.port)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "asking\n"
        yield seconds
        seconds += json.loads(process.communicate(timeout=30)[0])
    assert statistics.median(seconds) < MEDIAN_SECONDS, f"health took {statistics.median(seconds):.3f} s in the median"
    assert max(seconds) < WORST_SECONDS, f"health took {max(seconds):.3f} s at worst"


def main(port: int) -> None:
    """The process."""
    stopped = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), stopped.set()), daemon=True).start()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    seconds = []
    print("asking", flush=True)
    while not stopped.is_set():
        begun = time.monotonic()
        connection.request("GET", "/healthz")
        reply = connection.getresponse()
        reply.read()
        assert reply.status == 200
        seconds.append(time.monotonic() - begun)
        time.sleep(PAUSE)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main(int(sys.argv[1]))
