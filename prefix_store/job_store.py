"""What has been asked of the trainer: jobs, and the examples they train on."""

from __future__ import annotations

import dataclasses
import json
import secrets
import string
from collections.abc import Mapping, Sequence
from typing import Any

from prefix_store.backends.base import Backend
from prefix_store.backends.blobs import Blobs
from prefix_store.codec import digest_of
from prefix_store.errors import InvalidRequest, InvalidTrainingData
from prefix_store.jobs import BUILT_IN_METHODS, TRAINABLE_OBJECTIVES, Objective, TrainingJob, TrainingSpec
from prefix_store.prefix import check_name

EXAMPLE_FIELDS = ("prompt", "completion")
OPTIONS = frozenset(field.name for field in dataclasses.fields(TrainingSpec)) - {"data_digest", "examples"}
_ID_ALPHABET = string.ascii_letters + string.digits


class JobStore:
    """Jobs and their training data. The verbs besides `submit` and `examples` are the backend's own."""

    def __init__(self, backend: Backend, blobs: Blobs) -> None:
        self._backend = backend
        self._blobs = blobs
        self.claim = backend.claim
        self.heartbeat = backend.heartbeat
        self.finish = backend.finish
        self.request_cancel = backend.request_cancel
        self.job = backend.job
        self.jobs = backend.jobs
        self.job_counts = backend.job_counts
        self.add_event = backend.add_event
        self.events = backend.events

    def submit(
        self,
        tenant: str,
        name: str,
        examples: Sequence[Mapping[str, str]],
        options: Mapping[str, Any],
        methods: Sequence[str] = BUILT_IN_METHODS,
    ) -> TrainingJob:
        """Queues the training of `tenant/name` on examples of `prompt` and `completion`.

        `options`: fields of TrainingSpec. `methods`: the names that its `method` may have. Raises InvalidName,
        InvalidTrainingData with the line, InvalidRequest with the field.
        """
        check_name(tenant, "tenant")
        check_name(name)
        data = b"".join(_line(number, example) for number, example in enumerate(examples, start=1))
        spec = _spec(digest_of(data), len(examples), options, methods)
        self._blobs.put(data)
        return self._backend.enqueue(_new_id(), tenant, name, spec)

    def examples(self, job: TrainingJob) -> list[dict[str, str]]:
        """What the job trains on. Raises StoreCorrupt unless the stored bytes match the digest."""
        lines = self._blobs.read(job.spec.data_digest).split(b"\n")[:-1]
        return [json.loads(line) for line in lines]


def _line(number: int, example: Mapping[str, str]) -> bytes:
    if set(example) != set(EXAMPLE_FIELDS) or not all(isinstance(text, str) for text in example.values()):
        raise InvalidTrainingData(f"line {number}: expected the texts prompt and completion", param="examples")
    if not example["completion"]:
        raise InvalidTrainingData(f"line {number}: the completion is empty", param="examples")
    ordered = {field: example[field] for field in EXAMPLE_FIELDS}
    try:
        return json.dumps(ordered, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
    except UnicodeEncodeError:
        raise InvalidTrainingData(f"line {number}: not valid Unicode", param="examples") from None


def _spec(data_digest: str, examples: int, options: Mapping[str, Any], methods: Sequence[str]) -> TrainingSpec:
    for name in options:
        if name not in OPTIONS:
            raise InvalidRequest(f"unknown training option {name[:40]!r}", param=name[:40])
    for name, able in {"method": methods, "objective": TRAINABLE_OBJECTIVES}.items():
        if name in options and options[name] not in able:
            asked = str(options[name])[:40]
            raise InvalidRequest(f"{name} {asked!r} cannot be trained; what can: {', '.join(able)}", param=name)
    objective = Objective(options.get("objective", TrainingSpec.objective))
    return TrainingSpec(data_digest, examples, **{**options, "objective": objective})


def _new_id() -> str:
    return "ftjob-" + "".join(secrets.choice(_ID_ALPHABET) for _ in range(24))
