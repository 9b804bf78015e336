"""The frozen model: whether it loads, and is of a kind that can be served."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prefix_store.cli.amounts import size
from prefix_store.cli.checks.finding import Finding, ok, problem, warning
from prefix_store.errors import ModelUnsupported

MEMORY = Path("/proc/meminfo")
WEIGHTS = (".safetensors", ".bin")
# Half the bytes of float32, and every number that a float32 weight may be.
DTYPE = "bfloat16"


def look(source: str | None) -> Iterator[Finding]:
    """`source` as ANTEFIX_MODEL has it; the bundled model if absent. Loads it, if there is room."""
    import transformers

    from prefix_store.model import frozen

    chosen = Path(source or frozen.BUNDLED).expanduser()
    free, needed = _free_bytes(), _weight_bytes(chosen)
    if free is not None and needed > free:
        yield warning(
            "model", f"{chosen} was not tried: its weights are {size(needed)}, and {size(free)} of memory are free"
        )
        return
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    try:
        loaded = frozen.load(source or frozen.BUNDLED, dtype=DTYPE)
    except ModelUnsupported as error:
        yield problem("model", f"{error.message}: set ANTEFIX_MODEL to a folder or hub id of a model that is served")
        return
    layers = loaded.geometry.layers
    yield ok("model", f"{loaded.name} loads: {loaded.geometry.family}, {layers} layers, {size(needed)} of weights")


def _weight_bytes(folder: Path) -> int:
    if not folder.is_dir():
        return 0  # a hub id, or nothing
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in WEIGHTS)


def _free_bytes() -> int | None:
    if not MEMORY.is_file():
        return None
    line = next((line for line in MEMORY.read_text().splitlines() if line.startswith("MemAvailable:")), None)
    return 1024 * int(line.split()[1]) if line is not None else None
