"""What runs in Ray's processes: servers, each beside an actor, and the front, which passes every request on to one."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import httpx
from ray import serve
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from ray.util import get_node_ip_address
from starlette.requests import Request
from starlette.responses import Response

from prefix_store.errors import AntefixError, ShuttingDown
from prefix_store.store import Store
from prefix_store.tenants import DEFAULT_TENANT
from server.api import auth
from server.cluster.ranking import Ranking, key_of
from server.cluster.relay import TRIES, Relay

START_SECONDS, WAIT_SECONDS, STOP_SECONDS = 600.0, 30.0, 10.0
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1


class PrefixRouter(RequestRouter):
    """Ray's router of requests to replicas, by our ranking."""

    def initialize_state(self, rows: int) -> None:
        """Called by Ray with what the deployment says."""
        self._ranking = Ranking(rows)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One replica a rank, best first."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        loads = {name: self.replica_queue_len_cache.get(found.replica_id) or 0 for name, found in by_name.items()}
        asked = pending_request.kwargs
        return [[by_name[name]] for name in self._ranking.order(asked["key"], loads, asked["avoided"])]


class Replica:
    """One server in a process of its own, whose main thread is the engine's, and the actor that lives as long as it."""

    def __init__(self, host: str | None, threads: int, folder: str) -> None:
        _enter(folder)
        host = host or get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            port = probe.getsockname()[1]
        self._place = {"name": serve.get_replica_context().replica_id.unique_id, "url": f"http://{host}:{port}"}
        settings = [f"ANTEFIX_HOST={host}", f"ANTEFIX_PORT={port}", f"OMP_NUM_THREADS={threads}"]
        self._process = subprocess.Popen(["env", *settings, sys.executable, "-m", "server"], preexec_fn=_end_with_actor)
        self._await_start()
        threading.Thread(target=self._end_with_server, daemon=True).start()

    async def take(self, key: str | None, avoided: list[str]) -> AsyncIterator[dict[str, str]]:
        """Says where the server is, and counts as one of its requests until it is closed."""
        yield self._place
        await asyncio.Event().wait()

    def __del__(self) -> None:
        """Ray stops the replica, after its last request."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _await_start(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if (status := self._process.poll()) is not None:
                raise RuntimeError(f"the server ended at its start with status {status}")
            try:
                httpx.get(f"{self._place['url']}/readyz", trust_env=False).raise_for_status()
            except httpx.HTTPError:
                time.sleep(0.1)
            else:
                return
        raise RuntimeError(f"the server did not start within {START_SECONDS:g} seconds")

    def _end_with_server(self) -> None:
        self._process.wait()
        signal.raise_signal(signal.SIGKILL)  # Ray sees a dead actor at once, and starts another


def _end_with_actor() -> None:
    """Asks Linux to kill the server with its actor; elsewhere it lives on."""
    if sys.platform == "linux":
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Front:
    """What HTTP reaches: finds each request's prefix, lets the router choose a replica, and passes bytes on."""

    def __init__(self, replicas: DeploymentHandle, store: str, blobs: str | None, model: str, folder: str) -> None:
        _enter(folder)
        self.replicas = replicas.options(method_name="take", stream=True)
        self.client = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=5.0), limits=httpx.Limits(max_connections=None), trust_env=False
        )
        self.model = model
        self._store = Store.open(store, blobs)
        self._tenants: dict[str, str] = {}

    async def __call__(self, request: Request) -> Response:
        """Serves one request."""
        return Relay(self, request)

    async def key(self, request: Request, body: bytes) -> str | None:
        """What the request is about, as the router wants it."""
        presented = auth.presented_key(request)
        if presented is not None and presented not in self._tenants:
            try:
                found = await asyncio.to_thread(self._store.keys.authenticate, presented)
            except AntefixError:
                return None  # the replica says what is wrong
            self._tenants[presented] = found.tenant
        tenant = DEFAULT_TENANT if presented is None else self._tenants[presented]
        return key_of(request.url.path, body, tenant, self.model)

    @asynccontextmanager
    async def replica(self, key: str | None, avoided: list[str]) -> AsyncIterator[dict[str, str]]:
        """A replica, one of whose places is taken meanwhile. Raises ShuttingDown if there is none for long."""
        for _ in range(TRIES):
            taken = self.replicas.remote(key=key, avoided=avoided)
            try:
                try:
                    place = await asyncio.wait_for(anext(taken), WAIT_SECONDS)
                except TimeoutError:
                    break
                except RayError:
                    continue  # it has just gone
                yield place
                return
            finally:
                taken.cancel()
        raise ShuttingDown("no replica takes requests now; repeat this one later")


def _enter(folder: str) -> None:
    """Goes where the command was given, for paths that begin there; another machine may not have the folder."""
    with suppress(FileNotFoundError):
        os.chdir(folder)
