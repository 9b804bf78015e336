"""`python -m tests.bench.gpu [--tiny]`: checks a GPU, then measures it, in ten minutes; see docs/scaling.md.

Prints a line of JSON for every result as it comes, and writes all to `gpu.json`: under $OUT where that is set, else in
docs/results. The work is done by a process of its own: where that dies, another goes on with what is left.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.gpu.record import FILE, LOST, NOWHERE, RESULTS, Record

SECONDS = 560.0  # of the ten minutes that a command may have


def main() -> int:
    """0 where all checks passed that ran; a goal that is missed is news, not an error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="models so small that a CPU will do; no result counts")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="in all")
    arguments = parser.parse_args()
    begun = time.time()
    path, code = _folder(arguments.tiny) / FILE, None
    options = [*(["--tiny"] if arguments.tiny else []), "--anew"]
    while (left := arguments.seconds - (time.time() - begun)) > 0:
        command = [sys.executable, "-m", "tests.bench.gpu.worker", str(path), str(begun + arguments.seconds)]
        try:
            code = subprocess.run([*command, *options], timeout=left + 5, check=False).returncode
        except subprocess.TimeoutExpired:
            code = None
        if code == NOWHERE:
            return 1
        is_cut_off = Record(path).end_cut_off(f"the process ended with {code}" if code is not None else "out of time")
        if code == 0 or not (is_cut_off or code == LOST):
            break
        options = [option for option in options if option != "--anew"]
    record = Record(path)
    for name, goal in record.goals.items():
        print(json.dumps({"name": name, **(goal or {"met": None})}, ensure_ascii=False))
    wrong = record.wrong()
    print(json.dumps({"file": str(path), "checks_that_did_not_pass": wrong}, ensure_ascii=False))
    return 1 if wrong or code else 0


def _folder(is_tiny: bool) -> Path:
    if out := os.environ.get("OUT"):
        return Path(out)
    return Path(tempfile.mkdtemp()) if is_tiny else RESULTS


if __name__ == "__main__":
    sys.exit(main())
