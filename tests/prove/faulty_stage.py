"""What the proof of faults happens to: real processes over a real store, and what is counted of each fault."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from prefix_store.checkup import examine
from prefix_store.store import Store
from tests.e2e.processes import SERVE_WITH_WORKER, Running
from tests.prove.slow_proxy import SlowProxy
from tests.prove.steady_load import ALL, Expected, Load, Wanted, learn
from tests.redis_server import PROGRAMS, RedisServer, program
from tests.redis_server import running as redis_running

WHOLE_SECONDS = 400.0  # what takes longer than that has not healed
DISK_MB = 24


@dataclass
class Stage:
    """A server and a trainer under one supervisor; `redis` and `proxy`, or `disk`, are what their store is on."""

    running: Running
    store: str  # its address, past the proxy
    expected: Expected
    files: list[bytes]
    clients: int
    settle: float  # seconds of load before and after a fault
    redis: RedisServer | None = None
    proxy: SlowProxy | None = None
    disk: Path | None = None
    loads: list[Load] = field(default_factory=list)

    @property
    def client(self) -> httpx.Client:
        """For what the proof itself asks."""
        return self.running.client

    @contextmanager
    def loaded(self) -> Iterator[Load]:
        """A steady load around the block, which is where the fault is; some seconds of it on either side."""
        load = Load(str(self.client.base_url), self.expected, self.files)
        self.loads.append(load)
        with load.running(self.clients):
            time.sleep(self.settle)
            yield load
            time.sleep(self.settle)

    def kill(self, module: str) -> None:
        """Ends a process of the supervisor's, as `kill -9` does."""
        os.kill(child_of(self.running.process.pid, module), signal.SIGKILL)

    def lost(self) -> list[str]:
        """Whatever was acknowledged since the start and is not there, and what else is wrong with the store."""
        store = Store.open(self.store, create=False)
        try:
            faults = examine(store, lambda done, total: None).faults
        finally:
            store.close()
        return [name for load in self.loads for name in load.lost(self.client)] + faults


def child_of(parent: int, module: str) -> int:
    """The process that runs a module. Raises LookupError while there is none."""
    listed = subprocess.run(
        ["ps", "--ppid", str(parent), "-o", "pid=,args="], capture_output=True, text=True, check=False
    ).stdout
    for line in listed.splitlines():
        pid, _, command = line.strip().partition(" ")
        if f"-m {module}" in command:
            return int(pid)
    raise LookupError(f"no {module} runs: {listed}")


def wait_until(holds: Callable[[], Any], what: str) -> float:
    """How many seconds it took. Raises TimeoutError."""
    begun = time.monotonic()
    while True:
        try:
            if holds():
                return time.monotonic() - begun
        except (httpx.TransportError, LookupError):
            pass
        if time.monotonic() - begun > WHOLE_SECONDS:
            raise TimeoutError(f"{what}: not within {WHOLE_SECONDS:.0f} s")
        time.sleep(0.05)


def is_whole(client: httpx.Client) -> bool:
    """Whether it is ready, its store included, and publishes."""
    return client.get("/readyz", params={"store": "1"}).status_code == 200


def summary(load: Load, lost: list[str], whole: float, **more: Any) -> dict[str, Any]:
    """What every fault is judged by."""
    return {
        "requests": len(load.right) + len(load.failed) + len(load.wrong),
        "failed": load.failures(),
        "uploads": len(load.published),
        "uploads_refused": len(load.refused),
        "unclear": sorted(set(load.unclear()))[:5],
        "wrong": load.wrong[:5],
        "lost": lost[:5],
        "whole_seconds": round(whole, 2),
        **more,
    }


@contextmanager
def on_redis(files: list[bytes], clients: int, settle: float, wanted: Sequence[Wanted] = ALL) -> Iterator[Stage]:
    """Processes over a Redis that keeps everything it has acknowledged, behind a proxy."""
    kind = next(kind for kind in PROGRAMS if program(kind) is not None)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="antefix-faults-")))
        redis = stack.enter_context(redis_running(kind, folder))
        proxy = stack.enter_context(SlowProxy(folder / "redis.sock").running())
        running = stack.enter_context(_started(folder, *SERVE_WITH_WORKER, STORE=proxy.url))
        yield Stage(running, redis.url, learn(running.client, wanted), files, clients, settle, redis=redis, proxy=proxy)


@contextmanager
def on_small_disk(files: list[bytes], clients: int, settle: float, wanted: Sequence[Wanted] = ALL) -> Iterator[Stage]:
    """Processes over an embedded store on a disk of its own. Raises PermissionError where none can be mounted."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="antefix-faults-")))
        disk = folder / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(disk)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            raise PermissionError("no disk can be mounted here")
        stack.callback(subprocess.run, ["umount", str(disk)], check=True)
        store = f"sqlite:///{disk}/store.db"
        running = stack.enter_context(_started(folder, *SERVE_WITH_WORKER, STORE=store))
        yield Stage(running, store, learn(running.client, wanted), files, clients, settle, disk=disk)


@contextmanager
def _started(folder: Path, *command: str, **settings: str) -> Iterator[Running]:
    running = Running.start(folder, *command, **settings)
    try:
        yield running
    finally:
        running.close()
        sys.stdout.flush()
