"""`python -m server.engine.kernels`: compiles all our C now, for an image that will have no compiler."""

from __future__ import annotations

from server.engine import compiled, fused, int8_rows
from server.engine.attention import native

KERNELS = {"attention": native.SOURCES, "fused": fused.SOURCES, "int8_rows": int8_rows.SOURCES}


def main() -> None:
    """Says of each what came of it; where one cannot be compiled, torch does its work."""
    for name, sources in KERNELS.items():
        is_made = compiled.library(name, sources) is not None
        print(f"{name}: {'compiled' if is_made else 'cannot be compiled on this machine'}", flush=True)


if __name__ == "__main__":
    main()
