"""`python -m tests.prove NAME`: runs one proof, prints its table, writes its result file."""

from __future__ import annotations

import argparse
import json

import torch

from tests.bench import results
from tests.prove import model, prefixes, tables

PROOFS = {proof.SECTION: proof for proof in (model, prefixes, tables)}


def main() -> None:
    """Runs the named proof."""
    parser = argparse.ArgumentParser(prog="make prove NAME=…", description=__doc__)
    parser.add_argument("name", choices=PROOFS)
    proof = PROOFS[parser.parse_args().name]
    torch.set_num_threads(2)
    measured = proof.run()
    path = results.write(proof.SECTION, measured)
    print(f"\n{proof.table(measured)}\n\nwritten to {path}")
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
