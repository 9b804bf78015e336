"""`python -m trainer`: a worker that trains what is queued until it is told to stop."""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import sys
import threading

import torch
import transformers
from prometheus_client import CollectorRegistry, start_http_server

from prefix_store.errors import AntefixError
from prefix_store.model import frozen
from prefix_store.store import Store
from trainer import settings
from trainer.methods import METHODS, files
from trainer.metrics import Metrics
from trainer.progress import say
from trainer.worker import Worker

SETTINGS = "Settings are environment variables, ANTEFIX_…; docs/api.md lists them."
GRACE_SECONDS = 6.0  # for a step under way when the process is told to stop, and for saving where every run stands


def main() -> int:
    """Runs until SIGTERM or SIGINT; returns the exit status."""
    argparse.ArgumentParser("python -m trainer", description=__doc__, epilog=SETTINGS).parse_args()
    chosen = settings.read()
    # threads beyond the free cores wait for one another at every operation; the server beside us needs cores as well
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    registry = CollectorRegistry()
    try:
        worker = make_worker(chosen, registry)
    except AntefixError as error:
        say(error.message)
        return 1
    except KeyboardInterrupt:
        return 130
    serve_metrics(chosen.worker_metrics_host, chosen.worker_metrics_port, registry)
    return run(worker)


def make_worker(chosen: settings.Settings, registry: CollectorRegistry) -> Worker:
    """Opens the store, loads the model and prints the start line.

    Raises SystemExit for a method's file that cannot be used, StoreUnavailable, ModelUnsupported.
    """
    methods = {**METHODS, **files.load(chosen.methods)}
    metrics = Metrics(registry)
    store = Store.open(chosen.store, chosen.blobs)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if chosen.device == "auto" else chosen.device
    transformers.logging.disable_progress_bar()
    model = frozen.load(chosen.model or frozen.BUNDLED, device=device, name=chosen.model_name)
    place = re.sub(r"//[^/@]*@", "//", chosen.store)  # without a password
    worker = Worker(
        store,
        model,
        f"{socket.gethostname()}-{os.getpid()}",
        methods=methods,
        memory_bytes=chosen.train_memory_mb << 20 or None,
        on_step=metrics.stepped,
        on_pack=metrics.packed,
        on_end=metrics.ended,
    )
    metrics.watch(worker, lambda: store.jobs.lapsed)
    what = f"{model.name} ({model.digest[:12]}) by {', '.join(methods)}"
    say(f"{worker.name} trains {what} in float32 on {device}, jobs from {place}")
    return worker


def serve_metrics(host: str, port: int, registry: CollectorRegistry) -> None:
    """Prometheus' text, unless the port is 0; an address that cannot be had costs the metrics, not the worker."""
    if port == 0:
        return
    try:
        start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        say(f"no metrics: {host}:{port} cannot be opened ({error.strerror}); set ANTEFIX_WORKER_METRICS_PORT")
    else:
        say(f"metrics at http://{host}:{port}/metrics")


def run(worker: Worker) -> int:
    """Works in a thread of its own, so that a signal is heard in the middle of a long step."""
    asked: list[int] = []  # a handler that took a lock could meet the one it interrupts
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: asked.append(number))
    thread = threading.Thread(target=worker.run, name="worker", daemon=True)
    thread.start()
    while thread.is_alive() and not asked:
        thread.join(0.1)
    if not asked:
        return 1
    worker.stop()
    thread.join(GRACE_SECONDS)
    say("stopped")
    if thread.is_alive():
        worker.hand_back()
        sys.stdout.flush()
        os._exit(0)  # torch would not let the interpreter end before its step does
    return 0


if __name__ == "__main__":
    sys.exit(main())
