"""`python -m server.cluster`: replicas of the server in Ray Serve, behind one address, until a signal."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from server import logs, settings
from server.settings import Settings

NAME = "antefix"


def main() -> None:
    """Runs until SIGINT or SIGTERM. What prevents a start is one line on stderr."""
    _on_signals(_leave)
    parser = argparse.ArgumentParser("python -m server.cluster", description=__doc__)
    parser.add_argument("--min-replicas", type=int, required=True)
    parser.add_argument("--max-replicas", type=int, required=True)
    asked = parser.parse_args()
    if importlib.util.find_spec("ray") is None:
        raise SystemExit("antefix: --ray needs Ray: pip install 'antefix[ray]'")
    chosen = settings.read()
    if chosen.port == 0:
        raise SystemExit("antefix: ANTEFIX_PORT=0: Ray Serve needs a port by its number")
    logs.configure()
    print("antefix starts …", flush=True)
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        ray.init(include_dashboard=False, logging_level="warning", runtime_env={"env_vars": settings.variables()})
    except Exception as error:  # Ray raises just that
        raise SystemExit(f"antefix: Ray does not start: {error}") from None
    stopping = threading.Event()
    _on_signals(_leave)  # Ray has set its own
    try:
        _run(chosen, asked.min_replicas, asked.max_replicas)
        _on_signals(lambda number, frame: stopping.set())
        stopping.wait()
    finally:
        with suppress(RayServeException):  # of a start that did not get so far
            serve.delete(NAME)
        ray.shutdown()


def _run(chosen: Settings, fewest: int, most: int) -> None:
    """Returns when all answer."""
    import ray
    from ray import serve
    from ray.util import get_node_ip_address

    from server.cluster.deployment import Front, PrefixRouter, Replica

    model = _check(chosen, sum(node["Alive"] for node in ray.nodes()))
    have = ray.cluster_resources()
    cores = have["CPU"] // most or have["CPU"] / most
    here = {f"node:{get_node_ip_address()}": 0.001} if _is_of_one_machine(chosen) else {}
    on_gpu = chosen.device != "cpu" and "GPU" in have
    batches = {"min_replicas": fewest, "max_replicas": most, "target_ongoing_requests": chosen.max_batch}
    options = {"graceful_shutdown_timeout_s": 30.0, "graceful_shutdown_wait_loop_s": 0.2, "health_check_period_s": 1.0}
    replica = serve.deployment(
        Replica,
        autoscaling_config=batches,
        max_ongoing_requests=chosen.max_batch + chosen.max_waiting,  # more than it takes, so that it refuses, not Ray
        max_constructor_retry_count=2,
        ray_actor_options={"num_cpus": cores, "num_gpus": int(on_gpu), "resources": here},
        request_router_config={
            "request_router_class": PrefixRouter,
            "request_router_kwargs": {"rows": chosen.max_batch},
        },
        **options,
    )
    front = serve.deployment(
        Front, max_ongoing_requests=100_000, ray_actor_options={"num_cpus": 0, "resources": here}, **options
    )
    host = "127.0.0.1" if chosen.is_loopback else None
    servers = replica.bind(host, max(1, int(cores)), os.getcwd())
    serve.start(
        proxy_location="HeadOnly" if here else "EveryNode",
        http_options={"host": chosen.host, "port": chosen.port},
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )
    try:
        serve.run(
            front.bind(servers, chosen.store, chosen.blobs, model, os.getcwd()),
            name=NAME,
            logging_config={"enable_access_log": False, "log_level": "WARNING"},
        )
    except RuntimeError as error:
        raise SystemExit(f"antefix: {str(error).splitlines()[0]}; why is above") from None
    print(f"antefix: {fewest} to {most} replicas on http://{chosen.host}:{chosen.port}", flush=True)


def _check(chosen: Settings, machines: int) -> str:
    """The model's name. Raises SystemExit with one line for what cannot be served, or not by so many machines."""
    from prefix_store.errors import AntefixError
    from prefix_store.model import frozen
    from prefix_store.store import Store
    from server.start import check_access

    if machines > 1 and _is_of_one_machine(chosen):
        raise SystemExit(
            f"antefix: the Ray cluster has {machines} machines, and ANTEFIX_STORE={_kind(chosen)} with "
            f"ANTEFIX_HOST={chosen.host} is for one: set ANTEFIX_STORE=redis://…, and an ANTEFIX_HOST that others reach"
        )
    try:
        store = Store.open(chosen.store, chosen.blobs)
    except AntefixError as error:
        raise SystemExit(f"antefix: {error.message}") from None
    check_access(chosen, store)
    store.close()
    return chosen.model_name or (chosen.model.rstrip("/").rpartition("/")[2] if chosen.model else frozen.BUNDLED_NAME)


def _is_of_one_machine(chosen: Settings) -> bool:
    """Whether replicas elsewhere could not be reached, or would have a store of their own."""
    return chosen.is_loopback or _kind(chosen) == "sqlite"


def _kind(chosen: Settings) -> str:
    return chosen.store.partition(":")[0]


def _on_signals(act: Callable[[int, FrameType | None], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, act)


def _leave(number: int, frame: FrameType | None) -> None:
    """Ends a start that is still going on."""
    raise SystemExit(0)


if __name__ == "__main__":
    main()
