"""The table of sections: what `make bench` runs and the README shows, in this order.

A section is a module with `measure(kept) -> dict`, `table(measured) -> str` and, where it draws, `plot(measured)`.
"""

from __future__ import annotations

from types import ModuleType

from tests.bench import encoder_decoder, fair, flat, growth, http, latency, long, throughput, training

SECTIONS: dict[str, ModuleType] = {
    module.SECTION: module
    for module in (throughput, encoder_decoder, flat, long, fair, latency, growth, http, training)
}
# Measured with each thread on a core of its own. The others have threads beside the engine's, as a server has, and a
# pinned engine would pin these to its core.
PINNED = frozenset(
    {throughput.SECTION, encoder_decoder.SECTION, long.SECTION, fair.SECTION, growth.SECTION, training.SECTION}
)
