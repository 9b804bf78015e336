"""/v1/fine_tuning/jobs: training jobs as OpenAI's clients ask for them and watch them."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from prefix_store import examples
from prefix_store.backends.base import Transaction
from prefix_store.errors import InvalidName, InvalidRequest, NoSuchFile, PrefixNotFound
from prefix_store.examples import Example
from prefix_store.jobs import JobEvent, TrainingJob
from prefix_store.prefix import PrefixRef
from server.api import model_names, openai_views, references, repeats, schemas, training
from server.api.auth import Caller, Calling
from server.api.fine_tuning_schemas import FineTuningBody
from server.api.repeats import Keep, Reply
from server.api.services import Services, Serving

NO_METADATA = "null"
ABOUT = ("training_file", "validation_file", "metadata")
router = APIRouter(prefix="/v1/fine_tuning/jobs")
Limit = Annotated[int, Query(ge=1, le=1000)]


@router.post("")
async def create(request: Request, services: Serving, caller: Calling) -> Response:
    """Queues a job on uploaded files; the trainer publishes the prefix when it is done."""
    key = repeats.key_of(request.headers)
    body = await schemas.read(request, FineTuningBody)
    return (await to_thread.run_sync(_create, services, caller, key, body)).response()


@router.get("")
async def page(
    request: Request, services: Serving, caller: Calling, after: str | None = None, limit: Limit = 20
) -> dict[str, Any]:
    """The caller's jobs, newest first; those with each `metadata[KEY]=VALUE`, or `metadata=null`: with none."""
    wanted = _filter(request)
    jobs = await to_thread.run_sync(services.store.jobs.jobs, caller.tenant, after, limit + 1, wanted)
    return openai_views.page([openai_views.job(job, services.frozen) for job in jobs], limit)


@router.get("/{job_id}")
async def show(job_id: str, services: Serving, caller: Calling) -> dict[str, Any]:
    """One job."""
    return openai_views.job(await training.find(services, caller, job_id), services.frozen)


@router.get("/{job_id}/events")
async def events(
    job_id: str, services: Serving, caller: Calling, after: str | None = None, limit: Limit = 20
) -> dict[str, Any]:
    """A job's history, newest first. `after` is an event's id."""
    job = await training.find(services, caller, job_id)
    found = await to_thread.run_sync(_events, services, job, after, limit + 1)
    return openai_views.page([openai_views.event(event) for event in found], limit)


@router.get("/{job_id}/checkpoints")
async def checkpoints(
    job_id: str, services: Serving, caller: Calling, after: str | None = None, limit: Limit = 10
) -> dict[str, Any]:
    """What a job has made that can be used: the version that it published, while there is one."""
    job = await training.find(services, caller, job_id)
    found = await to_thread.run_sync(_checkpoints, services, job)
    if after is None:
        return openai_views.page(found, limit)
    if after != openai_views.checkpoint_id(job):
        raise _unknown("a checkpoint", after)
    return openai_views.page([], limit)  # there is never more than one


@router.post("/{job_id}/cancel")
async def cancel(job_id: str, services: Serving, caller: Calling) -> dict[str, Any]:
    """A queued job is cancelled at once, a running one within seconds."""
    return await _change(services.store.jobs.request_cancel, job_id, services, caller)


@router.post("/{job_id}/pause")
async def pause(job_id: str, services: Serving, caller: Calling) -> dict[str, Any]:
    """A queued job rests at once, a running one within seconds, and keeps what it has learnt."""
    return await _change(services.store.jobs.request_pause, job_id, services, caller)


@router.post("/{job_id}/resume")
async def resume(job_id: str, services: Serving, caller: Calling) -> dict[str, Any]:
    """A paused job waits for a worker again, which goes on where it stood."""
    return await _change(services.store.jobs.resume, job_id, services, caller)


async def _change(
    verb: Callable[[str, str, str], TrainingJob], job_id: str, services: Services, caller: Caller
) -> dict[str, Any]:
    return openai_views.job(await to_thread.run_sync(verb, caller.tenant, job_id, caller.by), services.frozen)


def _create(services: Services, caller: Caller, key: str | None, body: FineTuningBody) -> Reply:
    def work(keep: Keep) -> Reply:
        options, name = _options(services, caller, body), _name(services, body.suffix)
        data = _examples(services, caller, body.training_file, "training_file")
        judges = _examples(services, caller, body.validation_file, "validation_file")

        def also(transaction: Transaction, job: TrainingJob) -> None:
            keep(transaction, _shown(services, job))

        about = {field: getattr(body, field) for field in ABOUT}
        jobs, tenant = services.store.jobs, caller.tenant
        with body.as_written():
            options = training.for_this_server(services, options, data + judges, "training_file")
            fits = services.frozen.check_fits
            made = jobs.submit(tenant, name, data, options, services.methods, caller.by, also, judges, about, fits)
        return _shown(services, made)

    return repeats.answer(services, caller, key, ["fine-tune", body.model_dump()], work)


def _shown(services: Services, job: TrainingJob) -> Reply:
    return Reply(200, openai_views.job(job, services.frozen))


def _options(services: Services, caller: Caller, body: FineTuningBody) -> dict[str, Any]:
    """A model that is a prefix is what the new one starts from. Raises ModelNotFound, InvalidRequest."""
    options = body.options()
    start = model_names.resolve(body.model, services, caller)
    if start is None:
        return options
    if "init_from" in options:
        said = "the model is a prefix to start from already; leave antefix.init_from out"
        raise InvalidRequest(said, param="antefix.init_from")
    return options | {"init_from": str(start.ref)}


def _name(services: Services, suffix: str | None) -> str:
    """What the prefix will be called. Raises InvalidName."""
    if suffix is None:
        return f"ft-{secrets.token_hex(8)}"
    try:
        return references.new_name(services, suffix)
    except InvalidName as error:
        raise InvalidName(f"suffix is what the prefix will be called: {error.message}", param="suffix") from None


def _examples(services: Services, caller: Caller, file_id: str | None, param: str) -> list[Example]:
    """What is in a file, nothing in none. Raises NoSuchFile."""
    if file_id is None:
        return []
    files = services.store.files
    try:
        return examples.read(files.read(files.find(caller.tenant, file_id)), param)
    except NoSuchFile as error:
        raise NoSuchFile(error.message, param=param) from None


def _filter(request: Request) -> Callable[[TrainingJob], bool]:
    """Which jobs are asked for by their metadata."""
    asked = {
        name.removeprefix("metadata[").removesuffix("]"): value
        for name, value in request.query_params.items()
        if name.startswith("metadata[") and name.endswith("]")
    }
    if request.query_params.get("metadata") == NO_METADATA:
        return lambda job: not job.metadata
    return lambda job: asked.items() <= job.metadata.items()


def _events(services: Services, job: TrainingJob, after: str | None, limit: int) -> list[JobEvent]:
    jobs, last = services.store.jobs, 0
    if after is not None:
        last = openai_views.sequence_of(after, job) or 0
        there = jobs.events(job.tenant, job.id, last - 1, 1) if last else []
        if not there or there[0].sequence != last:
            raise _unknown("an event", after)
    return jobs.events(job.tenant, job.id, last, limit, newest_first=True)


def _unknown(what: str, after: str) -> InvalidRequest:
    return InvalidRequest(f"after must be the id of {what} of this job, got {after[:80]!r}", param="after")


def _checkpoints(services: Services, job: TrainingJob) -> list[dict[str, Any]]:
    if job.version is None:
        return []
    try:
        version = services.store.prefixes.resolve(PrefixRef(job.tenant, job.name, job.version))
    except PrefixNotFound:
        return []
    late = services.store.jobs.events(job.tenant, job.id, 0, 20, newest_first=True)
    kept = next((event for event in late if "kept" in event.data), None)
    return [openai_views.checkpoint(job, version, kept, training.report_of(services, job))]
