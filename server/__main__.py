"""`python -m server`: answers signals and wrong settings at once, and only then imports what takes seconds."""

from __future__ import annotations

import argparse
import gc
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType
from typing import TYPE_CHECKING

from server import logs, settings

if TYPE_CHECKING:
    from server.loading import Meanwhile

SETTINGS = "Settings are environment variables, ANTEFIX_…; docs/api.md lists them."


def main() -> None:
    """Runs until SIGINT or SIGTERM, and then ends with status 0. What prevents a start is one line on stderr."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    parser = argparse.ArgumentParser("python -m server", description=__doc__, epilog=SETTINGS)
    parser.add_argument("--ready-fd", type=int, help="a descriptor that a line is written to once requests are taken")
    asked = parser.parse_args()
    chosen = settings.read()
    logs.configure()
    print("antefix starts …", flush=True)
    from server import loading

    listener = loading.listen(chosen.host, chosen.port)
    with ExitStack() as stack:
        meanwhile = stack.enter_context(loading.answering(listener))
        _serve(chosen, listener, meanwhile, stack.close, asked.ready_fd)


def _serve(
    chosen: settings.Settings,
    listener: socket.socket,
    meanwhile: Meanwhile,
    stop_loading: Callable[[], None],
    ready_fd: int | None,
) -> None:
    # what is imported is never freed: looked through while it is made, it slows the start by an eighth, and later
    # every look at all of its 400,000 objects would stop every thread for a quarter of a second
    gc.disable()
    from server.start import serve

    gc.freeze()
    gc.enable()
    serve(chosen, listener, meanwhile, stop_loading, ready_fd)


def _stop(number: int, frame: FrameType | None) -> None:
    """Ends a start that is still going on; later uvicorn has handlers of its own."""
    raise SystemExit(0)


if __name__ == "__main__":
    main()
