"""What Ray keeps up: servers, each in a process of its own beside an actor, as many as the requests need."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from typing import Any

import httpx
from ray import serve
from ray.serve.config import AutoscalingContext
from ray.util import get_node_ip_address

from server import settings

# A server that says nothing for so long is not well; Ray replaces it when that has happened three times in a row.
CHECK_SECONDS = 5.0
REQUESTS = "requests"
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1


class Replica:
    """One server, whose main thread is the engine's, and the actor that lives as long as it.

    Settings are those of the environment that Ray was started in, for Ray logs what goes through it. The server
    listens on `host`, by default at the machine's own address, and gets `stop_seconds` to end in.
    """

    def __init__(self, host: str | None, stop_seconds: float) -> None:
        host = host or get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            port = probe.getsockname()[1]
        self._place = (serve.get_replica_context().replica_id.unique_id, f"http://{host}:{port}")
        self._stop_seconds = stop_seconds
        self._is_well, self._requests = True, 0
        told, tells = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "server", f"--ready-fd={tells}"],
            env=settings.environment_at(host, port),
            pass_fds=(tells,),
            preexec_fn=_end_with_actor,
        )
        os.close(tells)
        with open(told, "rb") as ready:
            if not ready.read():
                raise RuntimeError(f"the server ended at its start with status {self._process.wait()}")
        threading.Thread(target=self._end_with_server, daemon=True).start()

    def exchange(self, requests: dict[str, int]) -> tuple[str, str] | None:
        """Hears how many requests the front has for each replica; says where this one's server is, if it is well."""
        self._requests = requests.get(self._place[0], 0)
        return self._place if self._is_well else None

    def record_autoscaling_stats(self) -> dict[str, int]:
        """Asked by Ray, for `by_queue`."""
        return {REQUESTS: self._requests}

    async def check_health(self) -> None:
        """Asked by Ray. Raises RuntimeError for a server that hangs, or whose engine has failed."""
        try:
            async with httpx.AsyncClient(timeout=CHECK_SECONDS, trust_env=False) as client:
                (await client.get(f"{self._place[1]}/readyz")).raise_for_status()
        except httpx.HTTPError as error:
            self._is_well = False
            raise RuntimeError(f"the server is not well: {error!r}") from None
        self._is_well = True

    def __del__(self) -> None:
        """Ray stops the replica: a server that is well ends what it has begun."""
        if self._is_well:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(self._stop_seconds)
        self._process.kill()

    def _end_with_server(self) -> None:
        self._process.wait()
        signal.raise_signal(signal.SIGKILL)  # Ray sees a dead actor at once, and starts another


def by_queue(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """So many replicas that each has as many running and waiting requests as it should; Ray waits before it acts."""
    requests = sum(context.aggregated_metrics.get(REQUESTS, {}).values())
    return max(1, math.ceil(requests / context.config.target_ongoing_requests)), {}


def _end_with_actor() -> None:
    """Asks Linux to kill the server with its actor; elsewhere it lives on."""
    if sys.platform == "linux":
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
