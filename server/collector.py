"""Removes now and then what the store no longer needs, while the server runs."""

from __future__ import annotations

import threading

import structlog

from prefix_store.errors import AntefixError
from prefix_store.store import Store

COLLECT_SECONDS = 3600.0
# How long a collection that is going on gets to notice that its store was closed.
PATIENCE_SECONDS = 5.0
_log = structlog.get_logger("antefix.collector")


class Collector(threading.Thread):
    """Collects every so many seconds until it is stopped. It may be killed at any moment, and is with the process."""

    def __init__(self, store: Store, seconds: float) -> None:
        super().__init__(name="collector", daemon=True)
        self._store = store
        self._seconds = seconds
        self._stopped = threading.Event()

    def run(self) -> None:
        """The thread."""
        while not self._stopped.wait(self._seconds):
            self._collect()

    def stop(self) -> None:
        """Begins no further collection; closing the store ends one that is going on."""
        self._stopped.set()

    def _collect(self) -> None:
        try:
            removed = self._store.collect()
        except AntefixError as error:
            if not self._stopped.is_set():
                _log.warning("collection failed", error=error.message)
        except Exception:
            _log.exception("unhandled")
        else:
            if removed:
                _log.info("collected", blobs=removed)
