"""What a job needs of the worker that is to train it. It stands in the job's place among those that wait or run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prefix_store.jobs import TrainingSpec


@dataclass(frozen=True)
class Needs:
    """A base model, of which None is whichever, and a method."""

    base_digest: str | None
    method: str

    @classmethod
    def of(cls, spec: TrainingSpec) -> Needs:
        """Those of a job with this specification."""
        return cls(spec.base_digest, spec.method)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, a part of an entry."""
        return {"base": self.base_digest, "method": self.method}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Needs | None:
        """Those in an entry; None for one that an older version wrote."""
        return cls(entry["base"], entry["method"]) if "method" in entry else None


# Whether a worker has what a job needs.
Takes = Callable[[Needs], bool]


def whatever(needs: Needs) -> bool:
    """For who looks at all jobs alike."""
    return True
