"""What there is to say about each route in the OpenAPI document, beyond its parameters: a row a route."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from server.api import fine_tuning_shapes, job_shapes, openai_schemas, prefix_shapes, schemas, shapes
from server.api.fine_tuning_schemas import FineTuningBody

DIGEST = "e4c76bd9764133779ad452397eeccc66cfb88ea2138415e120295f5d491416bb"
# What any route answers that asks for a key; what it reads a body for; and what it is named an object for.
KEYED, WITH_BODY, NAMED = (400, 401, 403, 429, 500, 503), (408, 413), (404,)
GENERATING = (*NAMED, 422)
CONDITIONAL, REPEATABLE = (412,), (409, 422)


@dataclass(frozen=True)
class Row:
    """`reply` is a shape, or media types for what is no JSON. `body` is a schema, or None; `examples` of both.

    `others`: statuses beside `status` and those of every route.
    """

    reply: Any
    reply_example: Any
    body: type[BaseModel] | None = None
    body_example: Any = None
    status: int = 200
    others: tuple[int, ...] = ()
    streams: bool = False


NAME = {"id": "plays", "version": 1, "digest": DIGEST}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "virtual_tokens": 16}
OPENAI_USAGE = {**USAGE, "total_tokens": 5}
PREFIX: dict[str, Any] = {
    **{"id": "plays", "object": "prefix", "version": 1, "digest": DIGEST, "method": "prefix", "virtual_tokens": 16},
    **{"size_bytes": 164_328, "created_at": 1_790_000_000, "base_checked": True, "job_id": None, "metadata": {}},
    **{"pinned": False, "expires_at": None},
}
WHOLE_PREFIX = {**PREFIX, "current": True, "aliases": ["stable"]}
JOB: dict[str, Any] = {
    **{"id": "ftjob-1f0c8a9d3b5e7f2a4c6d8e0b", "object": "job", "prefix_id": "mine", "status": "queued"},
    **{"version": None, "created_at": 1_790_000_000, "started_at": None, "finished_at": None, "attempt": 0},
    **{"heartbeat_at": None, "silent_seconds": None, "cancel_requested": False, "pause_requested": False},
    **{"progress": None, "error": None},
    **{"examples": 1, "validation_examples": 0, "options": {"method": "prefix", "steps": None}},
}
CARD = {
    **{"id": "plays", "object": "model", "created": 1_790_000_000, "owned_by": "default", "root": "default/plays@1"},
    **{"parent": "antefix-demo", "max_model_len": 1008, "version": 1, "digest": DIGEST},
}
ANSWER = {"created": 1_790_000_000, "model": "plays", "system_fingerprint": "fp_596f6371849b0144", "prefix": NAME}
MESSAGES = [{"role": "user", "content": "The king"}]
RESIDENCY = {**NAME, "object": "prefix.residency", "preloaded": True}
SHARING = {"id": "plays", "object": "prefix.sharing", "tenants": ["acme"]}
FILE = {
    **{"id": "file-19a9d3b5e7f2a4c6d8e0b1f0c8a", "object": "file", "bytes": 34, "created_at": 1_790_000_000},
    **{"expires_at": None, "filename": "sums.jsonl", "purpose": "fine-tune", "status": "processed"},
    "status_details": None,
}
FINE_TUNING: dict[str, Any] = {
    **{"id": JOB["id"], "object": "fine_tuning.job", "created_at": 1_790_000_000, "error": None},
    **{"fine_tuned_model": None, "finished_at": None, "hyperparameters": {"n_epochs": "auto", "batch_size": "auto"}},
    **{"model": "antefix-demo", "organization_id": "default", "result_files": [], "seed": 0, "status": "queued"},
    **{"trained_tokens": None, "training_file": FILE["id"], "validation_file": None, "estimated_finish": None},
    **{"integrations": [], "metadata": {}, "method": {"type": "supervised"}, "antefix": {"prefix_id": "mine"}},
}
EXAMPLES = [{"prompt": "2 + 2 =", "completion": " 4"}]


def _page(item: Any) -> dict[str, Any]:
    return {"object": "list", "data": [item], "has_more": False}


def _openai_page(item: Any) -> dict[str, Any]:
    return {**_page(item), "first_id": item["id"], "last_id": item["id"]}


TURNED = Row(fine_tuning_shapes.FineTuningJob, FINE_TUNING, others=(404, 409))
FINISHED = Row(job_shapes.Job, JOB, others=(404, 409))
HEALTH = Row(shapes.Health, {"status": "ok"})
ROWS: dict[tuple[str, str], Row] = {
    ("GET", "/healthz"): HEALTH,
    ("GET", "/health"): HEALTH,
    ("GET", "/readyz"): Row(shapes.Readiness, {"status": "ready", "model": True, "store": True}, others=(400,)),
    ("GET", "/metrics"): Row("text/plain", "antefix_num_requests_running 0.0\n"),
    ("GET", "/openapi.json"): Row(shapes.Object, {"openapi": "3.1.0"}),
    ("GET", "/v1/model"): Row(
        shapes.Model,
        {"id": "antefix-demo", "object": "model", "geometry": {}, "base_digest": DIGEST, "context_length": 1024},
    ),
    ("POST", "/generate"): Row(
        shapes.Generated,
        {
            **{"id": "gen-1", "text": " was a", "finish_reason": "length", "prefix": NAME, "usage": USAGE},
            "timings": {"time_to_first_token_ms": 9.1, "total_ms": 30.2},
        },
        schemas.GenerateBody,
        {"prompt": "The king", "prefix_id": "plays", "max_tokens": 2, "temperature": 0},
        others=GENERATING,
        streams=True,
    ),
    ("POST", "/v1/completions"): Row(
        shapes.Completion,
        {
            **ANSWER,
            **{"id": "cmpl-1", "object": "text_completion", "usage": OPENAI_USAGE},
            "choices": [{"index": 0, "text": " was a", "logprobs": None, "finish_reason": "length"}],
        },
        openai_schemas.CompletionBody,
        {"model": "plays", "prompt": "The king", "max_tokens": 2},
        others=GENERATING,
        streams=True,
    ),
    ("POST", "/v1/chat/completions"): Row(
        shapes.ChatCompletion,
        {
            **ANSWER,
            **{"id": "chatcmpl-1", "object": "chat.completion", "usage": OPENAI_USAGE},
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": " was a", "refusal": None},
                    "logprobs": None,
                    "finish_reason": "length",
                }
            ],
        },
        openai_schemas.ChatBody,
        {"model": "plays", "messages": MESSAGES, "max_tokens": 2},
        others=GENERATING,
        streams=True,
    ),
    ("GET", "/v1/models"): Row(shapes.ModelList, {"object": "list", "data": [CARD]}),
    ("GET", "/v1/models/{model}"): Row(shapes.ModelCard, CARD, others=NAMED),
    ("DELETE", "/v1/models/{model}"): Row(
        shapes.Deleted, {"id": "plays", "object": "model", "deleted": True}, others=(*NAMED, 409, *CONDITIONAL)
    ),
    ("POST", "/tokenize"): Row(
        shapes.Tokenized,
        {"count": 2, "max_model_len": 1024, "tokens": [407, 1220], "token_strs": None},
        openai_schemas.TokenizeBody,
        {"prompt": "The king"},
        others=NAMED,
    ),
    ("POST", "/detokenize"): Row(
        shapes.Detokenized, {"prompt": "Th"}, openai_schemas.DetokenizeBody, {"tokens": [57, 73]}, others=NAMED
    ),
    ("GET", "/tokenizer_info"): Row(
        shapes.TokenizerInfo,
        {
            **{"tokenizer_class": "PreTrainedTokenizerFast", "vocab_size": 6144, "model_max_length": 1024},
            **{"bos_token": "<s>", "eos_token": "</s>", "pad_token": None, "unk_token": None, "chat_template": None},
        },
    ),
    ("POST", "/v1/prefixes"): Row(
        prefix_shapes.Prefix, WHOLE_PREFIX, status=201, others=(*WITH_BODY, *CONDITIONAL, *REPEATABLE)
    ),
    ("PUT", "/v1/prefixes/{name}/content"): Row(
        prefix_shapes.Prefix, WHOLE_PREFIX, status=201, others=(*NAMED, *WITH_BODY, *CONDITIONAL, *REPEATABLE)
    ),
    ("GET", "/v1/prefixes"): Row(prefix_shapes.PrefixPage, _page(PREFIX)),
    ("GET", "/v1/prefixes/{ref}"): Row(prefix_shapes.Prefix, WHOLE_PREFIX, others=(304, *NAMED)),
    ("PATCH", "/v1/prefixes/{ref}"): Row(
        prefix_shapes.Prefix, WHOLE_PREFIX, schemas.EditBody, {"metadata": {"team": "sales"}}, others=(*NAMED, 409)
    ),
    ("DELETE", "/v1/prefixes/{ref}"): Row(
        shapes.Deleted,
        {"id": "plays", "object": "prefix", "deleted": True, "versions": [1]},
        others=(*NAMED, 409, *CONDITIONAL),
    ),
    ("GET", "/v1/prefixes/{ref}/export"): Row(
        "application/octet-stream, application/zip", "the native file, or a zip", others=NAMED
    ),
    ("GET", "/v1/prefixes/{ref}/versions"): Row(prefix_shapes.PrefixPage, _page(WHOLE_PREFIX), others=NAMED),
    ("POST", "/v1/prefixes/{name}/rollback"): Row(
        prefix_shapes.Prefix, WHOLE_PREFIX, schemas.RollbackBody, {"version": 1}, others=(*NAMED, 409)
    ),
    ("PUT", "/v1/prefixes/{name}/aliases/{alias}"): Row(
        prefix_shapes.Prefix, WHOLE_PREFIX, schemas.VersionBody, {"version": 1}, others=(*NAMED, 409)
    ),
    ("DELETE", "/v1/prefixes/{name}/aliases/{alias}"): Row(
        shapes.Deleted,
        {"id": "plays", "object": "prefix.alias", "alias": "stable", "deleted": True},
        others=(*NAMED, 409),
    ),
    ("GET", "/v1/prefixes/{name}/sharing"): Row(prefix_shapes.Sharing, SHARING, others=NAMED),
    ("PUT", "/v1/prefixes/{name}/sharing"): Row(
        prefix_shapes.Sharing, SHARING, schemas.SharingBody, {"tenants": ["acme"]}, others=(*NAMED, 409)
    ),
    ("GET", "/v1/prefixes/{ref}/inspect"): Row(
        prefix_shapes.Inspection,
        {
            **NAME,
            **{"object": "prefix.inspection", "method": "prefix", "virtual_tokens": 16, "prompt_tokens": 0},
            **{"tokens": [], "layers": [], "attention": None, "absent": {"attention": "give a prompt"}},
            "computed_with": "the float32 weights as they were loaded",
        },
        others=NAMED,
    ),
    ("POST", "/v1/prefixes/{ref}/verify"): Row(
        prefix_shapes.Verification,
        {
            **{"object": "prefix.verification", "prefix": NAME, "ok": True, "checks": [], "controls": []},
            **{"rows_beside": 7, "neighbours": ["easy@1"], "prompts": 4, "tokens": 48, "reference": "transformers"},
            "computed_with": "the float32 weights as they were loaded",
        },
        others=(*NAMED, *WITH_BODY),
    ),
    ("POST", "/v1/prefixes/{ref}/preload"): Row(prefix_shapes.Residency, RESIDENCY, others=(*NAMED, *WITH_BODY, 409)),
    ("POST", "/v1/prefixes/{ref}/release"): Row(
        prefix_shapes.Residency, {**RESIDENCY, "preloaded": False}, others=(*NAMED, *WITH_BODY)
    ),
    ("POST", "/v1/prefixes/{name}/train"): Row(
        job_shapes.Accepted,
        {"job": JOB},
        schemas.TrainBody,
        {"examples": EXAMPLES},
        status=202,
        others=(*NAMED, *REPEATABLE),
    ),
    ("GET", "/v1/jobs"): Row(job_shapes.JobPage, _page(JOB)),
    ("GET", "/v1/jobs/{job_id}"): Row(job_shapes.Job, JOB, others=NAMED),
    ("GET", "/v1/jobs/{job_id}/events"): Row(
        job_shapes.EventPage,
        _page({"object": "job.event", "sequence": 1, "created_at": 1.79e9, "type": "queued", "data": {}}),
        others=NAMED,
    ),
    ("GET", "/v1/jobs/{job_id}/report"): Row(
        job_shapes.JobReport,
        {
            **{"object": "job.report", "job": JOB, "chosen": {}, "curve": [], "best": None},
            **{"samples": [], "messages": []},
        },
        others=NAMED,
    ),
    ("POST", "/v1/jobs/{job_id}/cancel"): FINISHED,
    ("POST", "/v1/jobs/{job_id}/pause"): FINISHED,
    ("POST", "/v1/jobs/{job_id}/resume"): FINISHED,
    ("POST", "/v1/files"): Row(fine_tuning_shapes.File, FILE, others=(*WITH_BODY, *CONDITIONAL, *REPEATABLE)),
    ("GET", "/v1/files"): Row(fine_tuning_shapes.FilePage, _openai_page(FILE)),
    ("GET", "/v1/files/{file_id}"): Row(fine_tuning_shapes.File, FILE, others=NAMED),
    ("GET", "/v1/files/{file_id}/content"): Row("application/octet-stream", "the file", others=NAMED),
    ("DELETE", "/v1/files/{file_id}"): Row(
        fine_tuning_shapes.FileDeleted, {"id": FILE["id"], "object": "file", "deleted": True}, others=(*NAMED, 409)
    ),
    ("POST", "/v1/fine_tuning/jobs"): Row(
        fine_tuning_shapes.FineTuningJob,
        FINE_TUNING,
        FineTuningBody,
        {"model": "plays", "training_file": FILE["id"]},
        others=(*NAMED, *REPEATABLE),
    ),
    ("GET", "/v1/fine_tuning/jobs"): Row(fine_tuning_shapes.FineTuningJobPage, _openai_page(FINE_TUNING)),
    ("GET", "/v1/fine_tuning/jobs/{job_id}"): Row(fine_tuning_shapes.FineTuningJob, FINE_TUNING, others=NAMED),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/events"): Row(
        fine_tuning_shapes.FineTuningEventPage,
        _openai_page(
            {
                **{"id": "ftevent-1f0c8a9d3b5e7f2a4c6d8e0b-1", "object": "fine_tuning.job.event", "level": "info"},
                **{"created_at": 1_790_000_000, "message": "published mine@1", "type": "message", "data": {}},
            }
        ),
        others=NAMED,
    ),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/checkpoints"): Row(
        fine_tuning_shapes.CheckpointPage,
        _openai_page(
            {
                **{"id": "ftckpt-1f0c8a9d3b5e7f2a4c6d8e0b", "object": "fine_tuning.job.checkpoint"},
                **{"created_at": 1_790_000_000, "fine_tuned_model_checkpoint": "mine@1", "step_number": 20},
                **{"fine_tuning_job_id": JOB["id"], "metrics": {"step": 20, "valid_loss": 1.5}},
            }
        ),
        others=NAMED,
    ),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel"): TURNED,
    ("POST", "/v1/fine_tuning/jobs/{job_id}/pause"): TURNED,
    ("POST", "/v1/fine_tuning/jobs/{job_id}/resume"): TURNED,
}
