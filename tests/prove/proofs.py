"""The table of proofs: what `make prove` runs and the README shows.

A proof is a module with `run() -> dict`, `table(measured) -> str` and `missed(measured) -> list`, the bars not reached.
"""

from __future__ import annotations

from types import ModuleType

from tests.prove import (
    compose,
    concurrent_store,
    faults,
    inspect,
    kill_store,
    kill_worker,
    model,
    monitoring,
    prefixes,
    ray_serve,
    soak,
    store_costs,
    tables,
    users,
)
from tests.prove.paper import comparison as paper
from tests.prove.summarise import comparison as summarise

PROOFS: dict[str, ModuleType] = {
    proof.SECTION: proof
    for proof in (
        *(
            model,
            prefixes,
            tables,
            inspect,
            soak,
            users,
            paper,
            summarise,
            kill_worker,
            concurrent_store,
            kill_store,
            store_costs,
            faults,
            monitoring,
            compose,
            ray_serve,
        ),
    )
}
