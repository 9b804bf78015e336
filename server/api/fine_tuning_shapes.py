"""What replies of OpenAI's files and fine-tuning look like, for the OpenAPI document."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict

from server.api.shapes import Object

Status = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]


class File(TypedDict):
    """An uploaded file, or a job's results."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: Literal["fine-tune", "fine-tune-results"]
    status: Literal["processed"]
    status_details: str | None


class FilePage(TypedDict):
    """A part of a list."""

    object: Literal["list"]
    data: list[File]
    has_more: bool
    first_id: str | None
    last_id: str | None


class FileDeleted(TypedDict):
    """What is gone."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


class FineTuningJob(TypedDict):
    """OpenAI's, with `antefix`: every option, null where the worker is to choose."""

    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    error: Object | None
    fine_tuned_model: str | None
    finished_at: int | None
    hyperparameters: Object
    model: str
    organization_id: str
    result_files: list[str]
    seed: int
    status: Status
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    estimated_finish: int | None
    integrations: list[Object]
    metadata: dict[str, str]
    method: Object
    antefix: Object


class FineTuningJobPage(TypedDict):
    """A part of a list."""

    object: Literal["list"]
    data: list[FineTuningJob]
    has_more: bool
    first_id: str | None
    last_id: str | None


class FineTuningEvent(TypedDict):
    """One line of a job's history."""

    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info"]
    message: str
    type: Literal["message", "metrics"]
    data: Object


class FineTuningEventPage(TypedDict):
    """A part of a list."""

    object: Literal["list"]
    data: list[FineTuningEvent]
    has_more: bool
    first_id: str | None
    last_id: str | None


class Checkpoint(TypedDict):
    """The version that a job has published."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: Object
    step_number: int


class CheckpointPage(TypedDict):
    """A part of a list."""

    object: Literal["list"]
    data: list[Checkpoint]
    has_more: bool
    first_id: str | None
    last_id: str | None
