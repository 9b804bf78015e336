"""`python -m tests.prove NAME`: runs one proof, prints its table, writes its result; fails where a bar is missed."""

from __future__ import annotations

import argparse
import json
import sys

import torch

from tests.bench import results
from tests.prove.proofs import PROOFS


def main() -> None:
    """Runs the named proof."""
    parser = argparse.ArgumentParser(prog="make prove NAME=…", description=__doc__)
    parser.add_argument("name", choices=PROOFS)
    proof = PROOFS[parser.parse_args().name]
    torch.set_num_threads(2)
    measured = proof.run()
    path = results.write(proof.SECTION, measured)
    if hasattr(proof, "plot"):
        proof.plot(measured)
    print(f"\n{proof.table(measured)}\n\nwritten to {path}")
    print(json.dumps(measured))
    if missed := proof.missed(measured):
        sys.exit(f"missed: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
