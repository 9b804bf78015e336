"""Long proofs, one file each: `make prove NAME=…` runs one and writes its result file under `docs/results`."""
