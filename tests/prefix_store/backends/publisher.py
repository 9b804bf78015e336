"""One of several processes that publish to one store: `python -m … KIND FOLDER WORKER COUNT`. Imports no torch."""

import hashlib
import sys
import time
from pathlib import Path

from prefix_store.geometry import ModelGeometry
from prefix_store.prefix import Method, PrefixManifest
from tests.prefix_store.backends.openers import OPENERS

MANIFEST = PrefixManifest(Method.PREFIX, ModelGeometry("llama", 2, 4, 2, 3, 12), 5, position_offset=5)


def digest_of(worker: str, index: int) -> str:
    return hashlib.sha256(f"{worker}/{index}".encode()).hexdigest()


def main(kind: str, folder: str, worker: str, count: str) -> None:
    backend = OPENERS[kind](Path(folder), time.time)
    for index in range(int(count)):
        backend.publish("acme", "shared", MANIFEST, digest_of(worker, index), 1, None)
        job = backend.claim(worker, 60.0)
        if job is not None:
            backend.publish("acme", job.name, MANIFEST, digest_of(job.id, 0), 1, job)
    backend.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
