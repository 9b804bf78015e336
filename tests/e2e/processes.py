"""Real processes for the end-to-end tests: started on a free port, waited for, always ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]
START_SECONDS, STOP_SECONDS = 120.0, 30.0
SERVER = ("-m", "server")
SERVE_WITH_WORKER = ("-c", "from prefix_store.cli import main; main()", "serve", "--worker")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment(**settings: str) -> dict[str, str]:
    """This process's own, with these settings alone."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("ANTEFIX_")}
    return own | {f"ANTEFIX_{name}": value for name, value in settings.items()} | {"PYTHONPATH": str(ROOT)}


@dataclass
class Running:
    """A process that answers at `client`; what it prints is in `log`."""

    process: subprocess.Popen[bytes]
    client: httpx.Client
    log: Path

    @classmethod
    def start(cls, folder: Path, *command: str, **settings: str) -> Running:
        """Starts a Python command with these settings alone, and waits until it is ready."""
        settings = {"PORT": str(free_port()), "WORKER_METRICS_PORT": "0", **settings}
        log = folder / f"{settings['PORT']}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=folder, env=environment(**settings), stdout=output, stderr=output
            )
        client = httpx.Client(base_url=f"http://127.0.0.1:{settings['PORT']}", timeout=60)
        running = cls(process, client, log)
        try:
            running.wait_until_ready()
        except BaseException:
            running.close()
            raise
        return running

    def wait_until_ready(self) -> None:
        """Fails with the log if it ends instead, or takes too long."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            try:
                self.client.get("/readyz").raise_for_status()
            except httpx.HTTPError:
                time.sleep(0.1)
            else:
                return

    def stop(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, float]:
        """Sends one signal; the exit status and the seconds it took."""
        begun = time.monotonic()
        self.process.send_signal(number)
        status = self.process.wait(STOP_SECONDS)
        return status, time.monotonic() - begun

    def close(self) -> None:
        """Ends it in any case."""
        self.client.close()
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(STOP_SECONDS)
