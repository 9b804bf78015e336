"""What replies about training look like, for the OpenAPI document."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict

from server.api.shapes import Object

Status = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]


class Job(TypedDict):
    """A training job. An option that is left to the worker is null."""

    id: str
    object: Literal["job"]
    prefix_id: str
    status: Status
    version: int | None
    created_at: int
    started_at: int | None
    finished_at: int | None
    attempt: int
    heartbeat_at: int | None
    silent_seconds: int | None
    cancel_requested: bool
    pause_requested: bool
    progress: Object | None
    error: Object | None
    examples: int
    validation_examples: int
    options: Object


class Accepted(TypedDict):
    """The job that was queued."""

    job: Job


class JobPage(TypedDict):
    """A part of a list."""

    object: Literal["list"]
    data: list[Job]
    has_more: bool


class JobEvent(TypedDict):
    """One line of a job's history."""

    object: Literal["job.event"]
    sequence: int
    created_at: float
    type: str
    data: Object


class EventPage(TypedDict):
    """A part of a list."""

    object: Literal["list"]
    data: list[JobEvent]
    has_more: bool


class JobReport(TypedDict):
    """How a job went so far."""

    object: Literal["job.report"]
    job: Job
    chosen: Object
    curve: list[Object]
    best: Object | None
    samples: list[Object]
    messages: list[str]
