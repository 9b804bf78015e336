"""Engine loops in tests: each in a thread of its own, as the test's has other things to do."""

from __future__ import annotations

import threading

from server.engine.engine import Engine
from server.engine.loop import EngineLoop


def running(engine: Engine) -> EngineLoop:
    """A loop that has begun; stop it."""
    loop = EngineLoop(engine)
    threading.Thread(target=loop.run, name="engine", daemon=True).start()
    return loop
