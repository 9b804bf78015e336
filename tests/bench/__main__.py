"""`python -m tests.bench [SECTION]`: prints each section's table, and one JSON line at the end."""

from __future__ import annotations

import argparse
import json

import torch

from tests.bench import throughput

SECTIONS = {throughput.SECTION: throughput}


def main() -> None:
    """Runs one section or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", nargs="?", default="all", choices=["all", *SECTIONS])
    chosen = parser.parse_args().section
    torch.set_num_threads(2)
    found = {}
    for name, section in SECTIONS.items():
        if chosen in ("all", name):
            found[name] = section.run()
            print("\n" + section.table(found[name]) + "\n")
    print(json.dumps({name: measured["ratios"] for name, measured in found.items()}))


if __name__ == "__main__":
    main()
