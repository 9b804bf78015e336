"""/v1/files: training data that is uploaded once and named by jobs, and the results of jobs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from prefix_store.backends.base import Transaction
from prefix_store.errors import Conflict, InvalidRequest, NoSuchFile
from prefix_store.files import PURPOSE, StoredFile
from prefix_store.jobs import TrainingJob
from server.api import conditions, form, openai_views, repeats, training, uploads
from server.api.auth import Caller, Calling
from server.api.form import Form
from server.api.repeats import Keep, Reply
from server.api.services import Services, Serving

PARTS = {"purpose": 64}
MOST = 10_000
router = APIRouter(prefix="/v1/files")


@router.post("")
async def upload(request: Request, services: Serving, caller: Calling) -> Response:
    """Takes JSON lines of any of training's shapes; refuses what could not be trained on, with the lines."""
    async with uploads.receiving(services) as path:
        key = repeats.key_of(request.headers)
        found = await form.read(request.headers, request.stream(), PARTS, path)
        conditions.check_digest(request.headers, found.file.digest, found.body_digest)
        if (purpose := found.fields.get("purpose", b"").decode(errors="replace")) != PURPOSE:
            raise InvalidRequest(f"purpose must be {PURPOSE!r}, got {purpose!r}", param="purpose")
        return (await to_thread.run_sync(_save, services, caller, key, found)).response()


@router.get("")
async def page(
    services: Serving,
    caller: Calling,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=MOST)] = MOST,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> dict[str, Any]:
    """The caller's uploaded files, newest first unless in `asc` order."""

    def work() -> list[StoredFile]:
        return services.store.files.page(caller.tenant, after, limit + 1, newest_first=order == "desc")

    found = await to_thread.run_sync(work) if purpose in (None, PURPOSE) else []
    return openai_views.page([openai_views.file(file) for file in found], limit)


@router.get("/{file_id}")
async def show(file_id: str, services: Serving, caller: Calling) -> dict[str, Any]:
    """One file."""
    return await to_thread.run_sync(_show, services, caller, file_id)


@router.get("/{file_id}/content")
async def content(file_id: str, services: Serving, caller: Calling) -> Response:
    """The bytes as they came; of a job's results, CSV."""
    data = await to_thread.run_sync(_read, services, caller, file_id)
    # not by the name that it came with, which may be any text
    named = {"content-disposition": f'attachment; filename="{file_id}"'}
    return Response(data, media_type="application/octet-stream", headers=named)


@router.delete("/{file_id}")
async def delete(file_id: str, services: Serving, caller: Calling) -> dict[str, Any]:
    """Removes a file. Jobs that were made from it keep what they need."""
    await to_thread.run_sync(_delete, services, caller, file_id)
    return {"id": file_id, "object": "file", "deleted": True}


def _save(services: Services, caller: Caller, key: str | None, found: Form) -> Reply:
    def work(keep: Keep) -> Reply:
        def also(transaction: Transaction, made: StoredFile) -> None:
            keep(transaction, _shown(made))

        file = found.file
        return _shown(services.store.files.save(caller.tenant, found.filename, file.path, file.digest, caller.by, also))

    return repeats.answer(services, caller, key, ["file", found.filename, found.file.digest], work)


def _shown(made: StoredFile) -> Reply:
    return Reply(200, openai_views.file(made))


def _show(services: Services, caller: Caller, file_id: str) -> dict[str, Any]:
    if (job := _job_of(services, caller, file_id)) is not None:
        return openai_views.results_file(job, _results(services, job))
    return openai_views.file(services.store.files.find(caller.tenant, file_id))


def _read(services: Services, caller: Caller, file_id: str) -> bytes:
    if (job := _job_of(services, caller, file_id)) is not None:
        return _results(services, job)
    return services.store.files.read(services.store.files.find(caller.tenant, file_id))


def _delete(services: Services, caller: Caller, file_id: str) -> None:
    if _job_of(services, caller, file_id) is not None:
        raise Conflict("a job's results stay as long as the job", param="file_id")
    services.store.files.delete(caller.tenant, file_id, caller.by)


def _job_of(services: Services, caller: Caller, file_id: str) -> TrainingJob | None:
    """The job whose results an id names; None for the id of an uploaded file. Raises NoSuchFile."""
    job_id = file_id.removeprefix(openai_views.FILE)
    if not job_id.startswith(openai_views.JOB):
        return None
    job = services.store.jobs.job(caller.tenant, job_id)
    if job is None or not openai_views.has_results(job):
        raise NoSuchFile(f"there is no file {file_id[:80]!r}")
    return job


def _results(services: Services, job: TrainingJob) -> bytes:
    return openai_views.results(training.report_of(services, job)["curve"])
