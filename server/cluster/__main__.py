"""`python -m server.cluster`: replicas of the server, kept up by Ray Serve, behind one address, until a signal."""

from __future__ import annotations

import argparse
import importlib.util
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from types import FrameType
from typing import Any

from server import logs, settings
from server.settings import Settings

NAME = "antefix"
ANSWER_SECONDS, STOP_SECONDS = 2.0, 10.0


def main() -> None:
    """Runs until SIGINT or SIGTERM. What prevents a start is one line on stderr, or is said by a replica above it."""
    _on_signals()
    parser = argparse.ArgumentParser("python -m server.cluster", description=__doc__)
    parser.add_argument("--min-replicas", type=int, required=True)
    parser.add_argument("--max-replicas", type=int, required=True)
    asked = parser.parse_args()
    if importlib.util.find_spec("ray") is None:
        raise SystemExit("antefix: --ray needs Ray: pip install 'antefix[ray]'")
    chosen = settings.read()
    logs.configure()
    print("antefix starts …", flush=True)
    from server import loading

    listener = loading.listen(chosen.host, chosen.port)
    with ExitStack() as stack:
        stack.enter_context(loading.answering(listener))
        _serve(chosen, listener, stack.close, asked.min_replicas, asked.max_replicas)


def _serve(chosen: Settings, listener: socket.socket, stop_loading: Callable[[], None], fewest: int, most: int) -> None:
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    from server import running
    from server.api.drain import Drain
    from server.cluster.front import Front

    _check(chosen)
    try:
        ray.init(include_dashboard=False, logging_level="warning")
    except Exception as error:  # Ray raises just that
        raise SystemExit(f"antefix: Ray does not start: {error}") from None
    _on_signals()  # Ray has set its own
    try:
        replicas = _start(chosen, fewest, most)

        def exchange(requests: dict[str, int]) -> dict[str, str]:
            answers = replicas.broadcast("exchange", requests)
            found = answers.results(timeout_s=ANSWER_SECONDS, return_exceptions=True)
            return dict(place for place in found if isinstance(place, tuple))

        drain = Drain(chosen.drain_seconds)
        front = Front(exchange, drain)
        stop_loading()
        says = f"antefix: {fewest} to {most} replicas on http://{chosen.host}:{listener.getsockname()[1]}"
        running.run(front, listener, front, drain, lambda: print(says, flush=True))
    finally:
        with suppress(RayServeException):  # of a start that did not get so far
            serve.delete(NAME)
        ray.shutdown()


def _check(chosen: Settings) -> None:
    """Raises SystemExit with the line that else every replica would end with."""
    from prefix_store.errors import AntefixError
    from prefix_store.store import Store
    from server.start import check_access

    try:
        store = Store.open(chosen.store, chosen.blobs)
    except AntefixError as error:
        raise SystemExit(f"antefix: {error.message}") from None
    check_access(chosen, store)
    store.close()


def _start(chosen: Settings, fewest: int, most: int) -> Any:
    """Ray's handle of the replicas, when all of the fewest answer. Raises SystemExit when they cannot start."""
    import ray
    from ray import serve
    from ray.serve.config import AutoscalingPolicy
    from ray.util import get_node_ip_address

    from server.cluster.deployment import Replica, by_queue

    have = ray.cluster_resources()
    resources = {f"node:{get_node_ip_address()}": 0.001} if chosen.is_loopback else {}
    stop_seconds = chosen.drain_seconds + STOP_SECONDS
    replica = serve.deployment(
        Replica,
        name="Replica",
        autoscaling_config={
            "min_replicas": fewest,
            "max_replicas": most,
            "target_ongoing_requests": chosen.max_batch,
            "policy": AutoscalingPolicy(policy_function=by_queue),
        },
        ray_actor_options={
            "num_cpus": have["CPU"] // most or have["CPU"] / most,  # Ray tells OpenMP, too
            "num_gpus": int(chosen.device != "cpu" and "GPU" in have),
            "resources": resources,
        },
        max_constructor_retry_count=2,
        graceful_shutdown_timeout_s=stop_seconds + 1,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2.0,
        health_check_timeout_s=10.0,
    )
    quiet = {"enable_access_log": False, "log_level": "WARNING"}
    serve.start(proxy_location="Disabled", logging_config=quiet)
    bound = replica.bind("127.0.0.1" if chosen.is_loopback else None, stop_seconds)
    try:
        return serve.run(bound, name=NAME, route_prefix=None, logging_config=quiet)
    except RuntimeError as error:
        raise SystemExit(f"antefix: {str(error).splitlines()[0]}; why is above") from None


def _on_signals() -> None:
    """For a start that is still going on; later uvicorn has handlers of its own."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


if __name__ == "__main__":
    main()
