"""Training jobs: ask for one, watch it, pause it, cancel it."""

from __future__ import annotations

from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from prefix_store import job_report
from prefix_store.backends.base import Transaction
from prefix_store.errors import InvalidRequest, JobNotFound
from prefix_store.job_model import check_examples, check_model
from prefix_store.jobs import JobEvent, TrainingJob
from prefix_store.model.prompt import check_chat_template
from server.api import queries, references, repeats, schemas, views
from server.api.auth import Caller, Calling
from server.api.repeats import Keep, Reply
from server.api.schemas import TrainBody
from server.api.services import Services, Serving

PAGE = 1000  # events read at a time
router = APIRouter(prefix="/v1")
Limit = Annotated[int, Query(ge=1, le=1000)]
Sequence = Annotated[int, Query(ge=0, le=2**63 - 1)]


@router.post("/prefixes/{name}/train")
async def train(request: Request, name: str, services: Serving, caller: Calling) -> Response:
    """Queues a job; the trainer publishes the prefix when it is done."""
    references.new_name(services, name)
    key = repeats.key_of(request.headers)
    body = await schemas.read(request, TrainBody)
    return (await to_thread.run_sync(_train, services, caller, key, name, body)).response()


@router.get("/jobs", dependencies=[Depends(queries.only_known)])
async def page(services: Serving, caller: Calling, after: str | None = None, limit: Limit = 100) -> dict[str, Any]:
    """The caller's jobs, newest first."""
    jobs = await to_thread.run_sync(services.store.jobs.jobs, caller.tenant, after, limit + 1)
    return views.page([views.job(job) for job in jobs], limit)


@router.get("/jobs/{job_id}", dependencies=[Depends(queries.only_known)])
async def show(job_id: str, services: Serving, caller: Calling) -> dict[str, Any]:
    """One job."""
    return views.job(await find(services, caller, job_id))


@router.get("/jobs/{job_id}/events", dependencies=[Depends(queries.only_known)])
async def events(
    job_id: str,
    services: Serving,
    caller: Calling,
    after: Annotated[int, Query(ge=0, le=2**63 - 1)] = 0,
    limit: Limit = 100,
) -> dict[str, Any]:
    """A job's history after a sequence number, oldest first."""
    await find(services, caller, job_id)
    found = await to_thread.run_sync(services.store.jobs.events, caller.tenant, job_id, after, limit + 1)
    return views.page([views.event(event) for event in found], limit)


@router.get("/jobs/{job_id}/report", dependencies=[Depends(queries.only_known)])
async def report(job_id: str, services: Serving, caller: Calling) -> dict[str, Any]:
    """How a job went so far: its curves, what was chosen for it, and samples once it is done."""
    found = await find(services, caller, job_id)
    made = await to_thread.run_sync(report_of, services, found)
    return {"object": "job.report", "job": views.job(found), **made}


@router.post("/jobs/{job_id}/cancel")
async def cancel(job_id: str, services: Serving, caller: Calling) -> dict[str, Any]:
    """A queued job is cancelled at once, a running one within seconds."""
    found = await to_thread.run_sync(services.store.jobs.request_cancel, caller.tenant, job_id, caller.by)
    return views.job(found)


@router.post("/jobs/{job_id}/pause")
async def pause(job_id: str, services: Serving, caller: Calling) -> dict[str, Any]:
    """A queued job rests at once, a running one within seconds, and keeps what it has learnt."""
    found = await to_thread.run_sync(services.store.jobs.request_pause, caller.tenant, job_id, caller.by)
    return views.job(found)


@router.post("/jobs/{job_id}/resume")
async def resume(job_id: str, services: Serving, caller: Calling) -> dict[str, Any]:
    """A paused job waits for a worker again, which goes on where it stood."""
    found = await to_thread.run_sync(services.store.jobs.resume, caller.tenant, job_id, caller.by)
    return views.job(found)


async def find(services: Services, caller: Caller, job_id: str) -> TrainingJob:
    """The caller's job. Raises JobNotFound."""
    job = await to_thread.run_sync(services.store.jobs.job, caller.tenant, job_id)
    if job is None:
        raise JobNotFound(f"there is no job {job_id[:80]!r}")
    return job


def report_of(services: Services, job: TrainingJob) -> dict[str, Any]:
    """How a job went so far, as `job_report` tells it. Blocking."""
    events: list[JobEvent] = []
    while page := services.store.jobs.events(job.tenant, job.id, events[-1].sequence if events else 0, PAGE):
        events += page
    return job_report.make(events)


def for_this_server(
    services: Services, options: dict[str, Any], examples: list[dict[str, Any]], param: str
) -> dict[str, Any]:
    """A job's options with what the server adds to them: its model and, for messages, how it writes them.

    Raises InvalidRequest for a prefix that leaves no room, and ChatTemplateMissing, naming `param`.
    """
    check_model(options, services.frozen.geometry)
    check_examples(examples, services.frozen.geometry, param)
    asked = options.get("virtual_tokens", 1)
    if asked + 2 > services.frozen.context_length:
        raise InvalidRequest(
            f"{asked} virtual tokens leave no room in a context of {services.frozen.context_length}",
            param="virtual_tokens",
        )
    added: dict[str, Any] = {"base_digest": services.frozen.digest}
    if any("messages" in example for example in examples):
        check_chat_template(services.frozen.tokenizer, services.chat_template, param)
        added["chat_template"] = services.chat_template
    return options | added


def _train(services: Services, caller: Caller, key: str | None, name: str, body: TrainBody) -> Reply:
    examples, validation = body.examples, body.validation_examples or []

    def work(keep: Keep) -> Reply:
        options = for_this_server(services, body.options(), examples + validation, "examples")

        def also(transaction: Transaction, job: TrainingJob) -> None:
            keep(transaction, _accepted(job))

        jobs, fits = services.store.jobs, services.frozen.check_fits
        made = jobs.submit(
            caller.tenant, name, examples, options, services.methods, caller.by, also, validation, fits=fits
        )
        return _accepted(made)

    return repeats.answer(services, caller, key, ["train", name, examples, validation, body.options()], work)


def _accepted(job: TrainingJob) -> Reply:
    return Reply(202, {"job": views.job(job)})
