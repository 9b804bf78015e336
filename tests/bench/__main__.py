"""`python -m tests.bench [SECTION]`: prints each section's table, and one JSON line of goals at the end.

Without a name, sections whose results were made by this code on this machine are not measured again. Each runs in a
process of its own, so that none finds the memory as another left it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings

import torch
import transformers

from tests.bench import results
from tests.bench.progress import say
from tests.bench.sections import PINNED, SECTIONS

THREADS = 2


def main() -> None:
    """Runs one section or all that need it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", nargs="?", default="all", choices=["all", *SECTIONS])
    parser.add_argument("--here", action="store_true", help="in this process")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    if arguments.here:
        run(arguments.section)
        return
    named = arguments.section != "all"
    chosen = [arguments.section] if named else list(SECTIONS)
    for name in chosen:
        if not named and results.is_current(name):
            say(f"{name}: docs/results/{name}.json is of this code and this machine")
        else:
            say(f"{name} …")
            subprocess.run([sys.executable, "-m", "tests.bench", name, "--here"], check=True, env=_environment(name))
        print("\n" + SECTIONS[name].table(results.read(name)) + "\n")
    print(json.dumps({name: results.read(name)["goals"] for name in chosen}, ensure_ascii=False))


def run(name: str) -> None:
    """Measures a section, going on where an interrupted run stood, and writes what came of it."""
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # between PEFT and transformers
    kept = results.Kept(name, results.CACHE)
    measured = SECTIONS[name].measure(kept)
    results.write(name, measured)
    if hasattr(SECTIONS[name], "plot"):
        SECTIONS[name].plot(measured)
    kept.clear()


def _environment(name: str) -> dict[str, str]:
    """OpenMP reads it before the first line of a program."""
    pinned = {"OMP_PROC_BIND": "true", "OMP_PLACES": "threads"} if name in PINNED else {}
    return {**os.environ, **pinned}


if __name__ == "__main__":
    main()
