"""Stored files and training jobs in OpenAI's shapes."""

from __future__ import annotations

import csv
import io
import re
import time
from collections.abc import Sequence
from typing import Any

from prefix_store.files import StoredFile
from prefix_store.job_report import CURVES
from prefix_store.jobs import JobEvent, JobStatus, TrainingJob
from prefix_store.model.frozen import FrozenModel
from prefix_store.prefix import PrefixVersion
from server.api import views
from server.api.fine_tuning_schemas import AUTO, default_rate

SAMPLES = "answers to validation examples, before and after"
NUMBER = re.compile(r"[1-9][0-9]{0,8}")
FILE, JOB, EVENT, CHECKPOINT = "file-", "ftjob-", "ftevent-", "ftckpt-"


def file(found: StoredFile) -> dict[str, Any]:
    """An uploaded file."""
    return _file(found.id, found.size_bytes, found.created_at, found.filename, found.purpose)


def results_file(job: TrainingJob, data: bytes) -> dict[str, Any]:
    """The file that a job's curve can be had as; it is made whenever it is asked for."""
    return _file(results_id(job), len(data), job.finished_at or 0.0, "step_metrics.csv", "fine-tune-results")


def results_id(job: TrainingJob) -> str:
    """What a job's results are called among files."""
    return FILE + job.id


def has_results(job: TrainingJob) -> bool:
    """Whether a job has ended, and had begun."""
    return job.status.is_final and job.started_at is not None


def results(curve: Sequence[dict[str, Any]]) -> bytes:
    """A report's curve as CSV, its first line naming the columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CURVES, lineterminator="\n")
    writer.writeheader()
    writer.writerows(curve)
    return text.getvalue().encode()


def job(found: TrainingJob, frozen: FrozenModel) -> dict[str, Any]:
    """A job. States have OpenAI's names; files are checked before there is a job, so none is `validating_files`.

    `antefix` has the options, null where the worker is to choose.
    """
    options = views.job(found)["options"]
    hyperparameters = _hyperparameters(found)
    is_final = found.status.is_final
    return {
        "id": found.id,
        "object": "fine_tuning.job",
        "created_at": int(found.created_at),
        "error": found.error and {"code": found.error.code, "message": found.error.message, "param": None},
        "fine_tuned_model": _model(found),
        "finished_at": None if found.finished_at is None else int(found.finished_at),
        "hyperparameters": hyperparameters,
        "model": _trained_on(found, frozen),
        "organization_id": found.tenant,
        "result_files": [results_id(found)] if has_results(found) else [],
        "seed": found.spec.seed,
        "status": found.status,
        "trained_tokens": found.progress.get("trained_tokens") if is_final else None,
        "training_file": found.training_file or "",
        "validation_file": found.validation_file,
        "estimated_finish": _estimated_finish(found),
        "integrations": [],
        "metadata": found.metadata,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "antefix": {"prefix_id": found.name, **options},
    }


def event(found: JobEvent) -> dict[str, Any]:
    """One line of a job's history; what is no metrics is a message here."""
    is_metrics = found.kind == "metrics"
    message = _measured(found.data) if is_metrics else found.data.get("message", SAMPLES)
    return {
        "id": f"{EVENT}{found.job_id.removeprefix(JOB)}-{found.sequence}",
        "object": "fine_tuning.job.event",
        "created_at": int(found.created_at),
        "level": "info",
        "message": message,
        "type": "metrics" if is_metrics else "message",
        "data": found.data,
    }


def sequence_of(event_id: str, job: TrainingJob) -> int | None:
    """Which line of the job's history this id names, or None."""
    start = f"{EVENT}{job.id.removeprefix(JOB)}-"
    number = event_id.removeprefix(start)
    return int(number) if event_id.startswith(start) and NUMBER.fullmatch(number) else None


def checkpoint_id(job: TrainingJob) -> str:
    """What the one version that a job publishes is called among its checkpoints."""
    return CHECKPOINT + job.id.removeprefix(JOB)


def checkpoint(
    found: TrainingJob, version: PrefixVersion, kept: JobEvent | None, report: dict[str, Any]
) -> dict[str, Any]:
    """The version that a job has published, as of the step that it kept."""
    step, loss = (kept.data["kept"]["step"], kept.data["kept"]["valid_loss"]) if kept is not None else (0, None)
    point: dict[str, Any] = next((point for point in report["curve"] if point["step"] == step), {})
    return {
        "id": checkpoint_id(found),
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(version.created_at),
        "fine_tuned_model_checkpoint": _model(found),
        "fine_tuning_job_id": found.id,
        "metrics": {"step": step, "train_loss": point.get("train_loss"), "valid_loss": loss, "full_valid_loss": loss},
        "step_number": step,
    }


def page(items: Sequence[dict[str, Any]], limit: int) -> dict[str, Any]:
    """A list page, made from up to `limit + 1` items."""
    shown = views.page(items, limit)
    ids = [item["id"] for item in shown["data"]]
    return {**shown, "first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}


def _file(file_id: str, size: int, created_at: float, filename: str, purpose: str) -> dict[str, Any]:
    return {
        "id": file_id,
        "object": "file",
        "bytes": size,
        "created_at": int(created_at),
        "expires_at": None,
        "filename": filename,
        "purpose": purpose,
        "status": "processed",
        "status_details": None,
    }


def _model(found: TrainingJob) -> str | None:
    """The reference to what a job has published; with its version, so that it stays just that."""
    return f"{found.name}@{found.version}" if found.version is not None else None


def _trained_on(found: TrainingJob, frozen: FrozenModel) -> str:
    """What was to be tuned further: a prefix, or the base model, which has no name here where it is another's."""
    spec = found.spec
    if spec.init_from is not None:
        return spec.init_from
    return frozen.name if spec.base_digest in (None, frozen.digest) else spec.base_digest


def _hyperparameters(found: TrainingJob) -> dict[str, Any]:
    spec = found.spec
    return {
        "n_epochs": AUTO if spec.epochs is None else spec.epochs,
        "batch_size": AUTO if "batch_size" in spec.unset else spec.batch_size,
        # a quotient of two decimal numbers, as near as its asker may have written it
        "learning_rate_multiplier": round(spec.learning_rate / default_rate(spec.method), 9),
    }


def _estimated_finish(found: TrainingJob) -> int | None:
    left = found.progress.get("seconds_left")
    return int(time.time() + left) if found.status is JobStatus.RUNNING and left is not None else None


def _measured(data: dict[str, Any]) -> str:
    """A step for people to read."""
    valid = data.get("valid_loss")
    judged = "" if valid is None else f", validation loss={valid:.4f}"
    return f"Step {data['step']}/{data.get('total_steps', '?')}: training loss={data['train_loss']:.4f}{judged}"
