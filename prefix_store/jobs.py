"""What has been asked of the trainer: specifications, jobs and their legal transitions."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from prefix_store.errors import InvalidRequest
from prefix_store.geometry import Stack, some_stacks
from prefix_store.prefix import check_template


class JobStatus(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """True once nothing can change any more."""
        return not TRANSITIONS[self]


TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    JobStatus.QUEUED: frozenset({JobStatus.RUNNING, JobStatus.PAUSED, JobStatus.CANCELLED}),
    # running -> queued: handed back by a worker that stops or has no room, or taken back after its lease has lapsed
    JobStatus.RUNNING: frozenset(
        {JobStatus.QUEUED, JobStatus.PAUSED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED}
    ),
    JobStatus.PAUSED: frozenset({JobStatus.QUEUED, JobStatus.CANCELLED}),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
}
MAX_ATTEMPTS = 3


class Objective(StrEnum):
    """What a job minimises."""

    LM = "lm"
    DISTIL = "distil"


# What a worker can do; anything else is refused when it is submitted, not after it has waited.
BUILT_IN_METHODS = ("prefix", "prefix_mlp", "prompt", "prompt_mlp", "prompt_lstm", "prefix_plus")
TRAINABLE_OBJECTIVES = tuple(Objective)
# The options that a worker chooses by the data, where nobody has.
CHOSEN_BY_DATA = ("virtual_tokens", "steps", "batch_size", "max_length")
WITH_TOKENS = BUILT_IN_METHODS[:-1]
# What a built-in method has instead of TrainingSpec's own default.
DEFAULTS: dict[str, dict[str, Any]] = {
    "prefix_mlp": {"learning_rate": 0.03},
    "prompt": {"learning_rate": 0.3},
    "prompt_mlp": {"learning_rate": 0.05},
    "prompt_lstm": {"learning_rate": 0.03},
    "prefix_plus": {"virtual_tokens": 0},
}
# The built-in methods to which an option says something; a plugged-in method may use any.
METHODS_WITH = {
    "virtual_tokens": WITH_TOKENS,
    "init": WITH_TOKENS,
    "init_text": WITH_TOKENS,
    "frozen_tokens": ("prefix", "prefix_mlp"),
    "bottleneck": ("prefix_mlp", "prompt_mlp", "prompt_lstm"),
    "feature_map": ("prefix_plus",),
    "stacks": ("prefix", "prefix_mlp"),
}
METHOD_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")


def method_files(setting: str) -> dict[str, Path]:
    """An operator's own tuning methods: `a.py,folder/b.py` is `{"a": …, "b": …}`. No file is looked at.

    Raises ValueError with the path and what is wrong with its name.
    """
    files: dict[str, Path] = {}
    for path in (Path(part.strip()).expanduser() for part in setting.split(",") if part.strip()):
        if path.suffix != ".py" or not METHOD_NAME.fullmatch(path.stem):
            raise ValueError(f"{path}: must be called NAME.py, with 1 to 32 of a-z 0-9 _ and a letter first in NAME")
        if path.stem in BUILT_IN_METHODS:
            raise ValueError(f"{path}: {path.stem!r} is a method that is built in")
        if path.stem in files:
            raise ValueError(f"{path}: {files[path.stem]} already has that name")
        files[path.stem] = path
    return files


@dataclass(frozen=True)
class TrainingSpec:
    """What to train. `data_digest` names the examples' blob (JSONL, see examples.py).

    `method` names how the prefix is tuned, which is not what its file holds (`prefix.Method`). `steps` optimiser steps
    of `batch_size` examples, or as many as `epochs` passes over all of them take; an example longer than `max_length`
    tokens loses its prompt's beginning first.
    `template`: text with one `{prompt}`, in which prompts stand here and when the prefix is served. `base_digest`: the
    model that the prefix is wanted for; None trusts whichever the worker has. `validation_examples`: how many lines of
    the blob, behind those to learn from, are to judge by; 0 sets some of the others aside. `chat_template`: what
    messages are written by; None is the tokenizer's own. `unset`: options that nobody chose, of CHOSEN_BY_DATA; what
    stands in them gives way to what the worker finds right for the data.

    `learning_rate` is the peak of `schedule`, which is reached after `warmup`, a part of the steps from 0 to 1. For the
    built-in methods it is a share of the spread of what they tune, and so means the same on every model.
    `weight_decay` leads back to the start.

    The prefix starts as the examples, as `init_text`, as random tokens (`init`) or as another prefix (`init_from`).
    Its first `frozen_tokens` stay as they are. `bottleneck`: the inner width of an encoder. `feature_map`: phi of a
    memory. `context`: the text that objective `distil` teaches the prefix. `stacks`: the attentions of an
    encoder-decoder model that get keys and values, in the order of `Stack`; None is all that the model has.
    `patience`: validations without a better prefix after which the run ends, 0 for never, because the last steps, which
    are the smallest, often help most. `publish_anyway`: also a prefix that is no better than none.
    """

    data_digest: str
    examples: int
    method: str = "prefix"
    objective: Objective = Objective.LM
    virtual_tokens: int = 16
    steps: int = 200
    batch_size: int = 8
    learning_rate: float = 0.1
    max_length: int = 256
    init_text: str | None = None
    template: str | None = None
    seed: int = 0
    base_digest: str | None = None
    validation_examples: int = 0
    chat_template: str | None = None
    unset: tuple[str, ...] = ()
    schedule: str = "linear"
    warmup: float = 0.05
    weight_decay: float = 0.0
    init: str = "text"
    init_from: str | None = None
    frozen_tokens: int = 1
    bottleneck: int = 512
    feature_map: str = "elu"
    context: str | None = None
    patience: int = 0
    publish_anyway: bool = False
    epochs: int | None = None
    stacks: tuple[Stack, ...] | None = None

    # inclusive bounds of every number a user may set
    LIMITS = {  # noqa: RUF012  (a constant table, not a field)
        "virtual_tokens": (0, 4096),
        "steps": (1, 100_000),
        "epochs": (1, 10_000),
        "batch_size": (1, 256),
        "learning_rate": (1e-7, 10.0),
        "max_length": (2, 32_768),
        "seed": (0, 2**63 - 1),
        "warmup": (0.0, 1.0),
        "weight_decay": (0.0, 10.0),
        "frozen_tokens": (0, 4096),
        "bottleneck": (1, 8192),
        "patience": (0, 1000),
    }
    CHOICES = {  # noqa: RUF012
        "schedule": ("linear", "cosine"),
        "init": ("text", "random_tokens"),
        "feature_map": ("elu", "gelu"),
    }

    def __post_init__(self) -> None:
        for name, (low, high) in self.LIMITS.items():
            value = getattr(self, name)
            if value is None and name == "epochs":
                continue
            whole = isinstance(low, int)
            # not isinstance: True is no number here
            if type(value) not in ((int,) if whole else (int, float)) or not low <= value <= high:
                kind = "a whole number" if whole else "a number"
                raise InvalidRequest(f"{name} must be {kind} from {low} to {high}, got {str(value)[:40]}", param=name)
        if not isinstance(self.method, str) or not METHOD_NAME.fullmatch(self.method):
            raise InvalidRequest(f"method must be a method's name, got {str(self.method)[:40]!r}", param="method")
        for name in ("init_text", "init_from", "context"):
            if not isinstance(getattr(self, name), str | None):
                raise InvalidRequest(f"{name} must be a text", param=name)
        for name, able in self.CHOICES.items():
            if getattr(self, name) not in able:
                asked = str(getattr(self, name))[:40]
                raise InvalidRequest(f"{name} must be {' or '.join(able)}, got {asked!r}", param=name)
        if self.template is not None:
            check_template(self.template, param="template")
        if type(self.publish_anyway) is not bool:
            raise InvalidRequest("publish_anyway must be true or false", param="publish_anyway")
        if self.examples < 1:
            raise InvalidRequest("training needs at least one example", param="examples")
        if self.stacks is not None:
            try:
                object.__setattr__(self, "stacks", some_stacks(self.stacks))
            except ValueError as error:
                raise InvalidRequest(str(error), param="stacks") from None
        self._check_together()

    def _check_together(self) -> None:
        if (self.virtual_tokens == 0) != (self.method == "prefix_plus"):
            right = "0 for prefix_plus, which has none" if self.virtual_tokens else "at least 1"
            raise InvalidRequest(f"virtual_tokens must be {right}, got {self.virtual_tokens}", param="virtual_tokens")
        starts = [name for name in ("init_text", "init_from") if getattr(self, name) is not None]
        starts += ["init"] if self.init != "text" else []
        if len(starts) > 1:
            raise InvalidRequest(f"a prefix starts from one thing, got {' and '.join(starts)}", param=starts[1])
        if (self.context is not None) != (self.objective == Objective.DISTIL):
            raise InvalidRequest("objective distil needs a context, and no other objective has one", param="context")
        if self.learning_rate * self.weight_decay > 1:
            raise InvalidRequest("weight_decay times learning_rate must be at most 1", param="weight_decay")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, as the backends keep it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TrainingSpec:
        """Reads `to_json`'s object."""
        return cls(**{**data, "objective": Objective(data["objective"]), "unset": tuple(data.get("unset", ()))})


@dataclass(frozen=True)
class JobError:
    """Why a job failed: a stable code and a sentence."""

    code: str
    message: str


@dataclass(frozen=True)
class TrainingJob:
    """One job as the store knows it. `fence` grows with every claim; a write with an older fence is refused.

    `heartbeat_at`: when its worker last said that it is alive. `lapses`: leases that ran out since it last got on.
    `checkpoint`: the digest of the blob that it goes on from. `training_file`, `validation_file`: ids of the uploaded
    files that its examples were read from, if they were.
    """

    id: str
    tenant: str
    name: str
    spec: TrainingSpec
    status: JobStatus
    created_at: float
    attempt: int = 0
    fence: int = 0
    worker: str | None = None
    lease_until: float | None = None
    heartbeat_at: float | None = None
    cancel_requested: bool = False
    pause_requested: bool = False
    lapses: int = 0
    checkpoint: str | None = None
    started_at: float | None = None
    finished_at: float | None = None
    version: int | None = None
    error: JobError | None = None
    progress: dict[str, Any] = field(default_factory=dict)
    training_file: str | None = None
    validation_file: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, as the store keeps it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TrainingJob:
        """Reads `to_json`'s object; fields that it does not know are a later version's."""
        fields = {field.name: data[field.name] for field in dataclasses.fields(cls) if field.name in data}
        fields["spec"] = TrainingSpec.from_json(data["spec"])
        fields["status"] = JobStatus(data["status"])
        fields["error"] = JobError(**data["error"]) if data["error"] is not None else None
        return cls(**fields)


@dataclass(frozen=True)
class JobEvent:
    """One line of a job's history, numbered from 1 within the job. `kind` is `message`, `metrics` or `samples`."""

    job_id: str
    sequence: int
    created_at: float
    kind: str
    data: dict[str, Any]


@dataclass(frozen=True)
class Heartbeat:
    """What a heartbeat tells the worker."""

    cancel_requested: bool
    pause_requested: bool
