import dataclasses
import re
import time
from typing import Any

import pytest
from starlette.testclient import TestClient

from prefix_store.jobs import BUILT_IN_METHODS, JobStatus, TrainingSpec
from prefix_store.model.frozen import FrozenModel
from prefix_store.store import Store
from server.api import views
from tests.models import random_kv
from tests.server import artefacts
from tests.server.conftest import Serve

EXAMPLES = [{"prompt": "2+2=", "completion": "4"}, {"prompt": "", "completion": "ok"}]

CHAT = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}]


def train(client: TestClient, name: str = "sums", **options: Any) -> dict[str, Any]:
    reply = client.post(f"/v1/prefixes/{name}/train", json={"examples": EXAMPLES, **options})
    assert reply.status_code == 202, reply.text
    job: dict[str, Any] = reply.json()["job"]
    return job


def test_a_job_is_queued_with_its_examples_and_options(client: TestClient, store: Store) -> None:
    job = train(
        client,
        virtual_tokens=5,
        steps=7,
        learning_rate=0.1,
        seed=None,
        method="prefix",
        init_text="Hi",
        template="{prompt}:",
    )
    assert job["id"].startswith("ftjob-")
    assert (job["prefix_id"], job["status"], job["examples"], job["version"]) == ("sums", "queued", 2, None)
    expected = {"virtual_tokens": 5, "steps": 7, "learning_rate": 0.1, "init_text": "Hi", "template": "{prompt}:"}
    assert {name: job["options"][name] for name in expected} == expected
    assert job["options"]["seed"] == TrainingSpec.seed
    claimed = store.jobs.claim("worker", 60)
    assert claimed is not None
    assert store.jobs.examples(claimed) == EXAMPLES


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "examples"),
        ({"examples": []}, "examples"),
        ({"examples": [{"prompt": "a"}]}, "examples"),
        ({"examples": [{"prompt": "a", "completion": ""}]}, "examples"),
        ({"examples": [{"prompt": "a", "completion": 3}]}, "examples"),
        ({"examples": [{"prompt": "a", "completion": "b", "compl": "c"}]}, "examples"),
        ({"examples": EXAMPLES, "validation_examples": [{"text": ""}]}, "validation_examples"),
        ({"examples": EXAMPLES, "validation_examples": []}, "validation_examples"),
        ({"examples": ["a"]}, "examples"),
        ({"examples": CHAT}, "examples"),
        ({"examples": EXAMPLES, "step": 3}, "step"),
        ({"examples": EXAMPLES, "steps": 0}, "steps"),
        ({"examples": EXAMPLES, "steps": "3"}, "steps"),
        ({"examples": EXAMPLES, "steps": 10**400}, "steps"),
        ({"examples": EXAMPLES, "learning_rate": 1e9}, "learning_rate"),
        ({"examples": EXAMPLES, "method": "lora"}, "method"),
        ({"examples": EXAMPLES, "method": 3}, "method"),
        ({"examples": EXAMPLES, "objective": "distil"}, "context"),
        ({"examples": EXAMPLES, "context": "a text"}, "context"),
        ({"examples": EXAMPLES, "context": "", "objective": "distil"}, "context"),
        ({"examples": EXAMPLES, "schedule": "step"}, "schedule"),
        ({"examples": EXAMPLES, "warmup": 2}, "warmup"),
        ({"examples": EXAMPLES, "weight_decay": "1"}, "weight_decay"),
        ({"examples": EXAMPLES, "bottleneck": 4}, "bottleneck"),
        ({"examples": EXAMPLES, "stacks": ["self", "encoder"]}, "stacks"),
        ({"examples": EXAMPLES, "stacks": "self"}, "stacks"),
        ({"examples": EXAMPLES, "method": "prefix_plus", "virtual_tokens": 4}, "virtual_tokens"),
        ({"examples": EXAMPLES, "objective": "rl"}, "objective"),
        ({"examples": EXAMPLES, "virtual_tokens": 4000}, "virtual_tokens"),
        ({"examples": EXAMPLES, "template": "no place"}, "template"),
        ({"examples": EXAMPLES, "template": 3}, "template"),
        ({"examples": EXAMPLES, "patience": -1}, "patience"),
        ({"examples": EXAMPLES, "publish_anyway": "perhaps"}, "publish_anyway"),
    ],
)
def test_what_cannot_be_trained_is_400_and_named(client: TestClient, body: dict[str, Any], param: str) -> None:
    reply = client.post("/v1/prefixes/sums/train", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text
    assert client.get("/v1/jobs").json()["data"] == []


def test_a_wrong_example_is_named_by_its_line_with_what_was_expected(client: TestClient) -> None:
    reply = client.post("/v1/prefixes/sums/train", json={"examples": [*EXAMPLES, {"text": "a"}, {"text": 3}]})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_training_file")
    assert reply.json()["error"]["message"] == "line 4: text must be a text, got a number"


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([None], "line 1: expected an object {.*}, got null"),
        ([*EXAMPLES, "a"], "line 3: expected an object {.*}, got a text"),
        ([], "expected a list of one or more examples, got an empty list"),
        ({"prompt": "a"}, "expected a list of one or more examples, got an object with 'prompt'"),
    ],
)
@pytest.mark.parametrize("field", ["examples", "validation_examples"])
def test_what_is_no_example_is_named_by_its_line_too(
    client: TestClient, field: str, examples: Any, message: str
) -> None:
    reply = client.post("/v1/prefixes/sums/train", json={"examples": EXAMPLES, field: examples})
    assert reply.status_code == 400
    assert re.fullmatch(f"{field}: {message}", reply.json()["error"]["message"])


def test_options_that_are_left_to_the_worker_are_null(client: TestClient) -> None:
    options = train(client, steps=7)["options"]
    assert (options["steps"], options["virtual_tokens"], options["batch_size"]) == (7, None, None)
    assert not {"unset", "chat_template", "data_digest"} & set(options)


def test_examples_to_judge_by_may_come_with_those_to_learn_from(client: TestClient, store: Store) -> None:
    job = train(client, validation_examples=[{"text": "a"}])
    assert (job["examples"], job["validation_examples"]) == (2, 1)
    claimed = store.jobs.claim("worker", 60)
    assert claimed is not None
    assert store.jobs.validation_examples(claimed) == [{"text": "a"}]


@pytest.mark.parametrize("field", ["examples", "validation_examples"])
def test_messages_need_a_chat_template_which_goes_with_the_job(serve: Serve, store: Store, field: str) -> None:
    body = {"examples": EXAMPLES, field: CHAT}
    refused = serve().post("/v1/prefixes/sums/train", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "chat_template_missing")
    assert refused.json()["error"]["param"] == "examples"
    assert serve(chat_template="{{ x }}").post("/v1/prefixes/sums/train", json=body).status_code == 202
    claimed = store.jobs.claim("worker", 60)
    assert claimed is not None
    assert claimed.spec.chat_template == "{{ x }}"


def test_a_report_is_made_of_what_the_worker_recorded(client: TestClient, store: Store) -> None:
    job_id = train(client)["id"]
    empty = {"chosen": {}, "curve": [], "best": None, "samples": [], "messages": []}
    found = client.get(f"/v1/jobs/{job_id}/report").json()
    assert found.pop("job") == client.get(f"/v1/jobs/{job_id}").json()
    assert found == {"object": "job.report", **empty}
    claimed = store.jobs.claim("worker", 60)
    assert claimed is not None
    for step in range(1, 1102):  # more than a page
        store.jobs.add_event(claimed, "metrics", {"step": step, "train_loss": 1 / step, "valid_loss": None})
    store.jobs.add_event(claimed, "message", {"message": "done"})
    found = client.get(f"/v1/jobs/{job_id}/report").json()
    assert [point["step"] for point in found["curve"]] == list(range(1, 1102))
    assert found["messages"] == ["done"]
    assert client.get(f"/v1/jobs/{job_id}/report?odd=1").status_code == 400


def test_methods_are_those_built_in_and_those_the_server_was_told_of(serve: Serve) -> None:
    client = serve(methods=("prefix", "prompt", "low_rank"))
    for method in ("prompt", "low_rank"):
        assert train(client, method=method)["options"]["method"] == method
    refused = client.post("/v1/prefixes/sums/train", json={"examples": EXAMPLES, "method": "low_rnk"})
    message = "method 'low_rnk' cannot be trained; what can: prefix, prompt, low_rank"
    assert refused.status_code == 400
    assert refused.json()["error"] == {
        "message": message, "type": "invalid_request_error", "param": "method", "code": "invalid_request"
    }  # fmt: skip


def test_every_method_and_objective_can_be_asked_for(client: TestClient) -> None:
    for method in BUILT_IN_METHODS:
        job = train(client, method=method, objective="distil", context="A text.", schedule="cosine", warmup=0)
        shown = job["options"]
        assert shown["method"] == method
        assert (shown["objective"], shown["context"], shown["schedule"]) == ("distil", "A text.", "cosine")
        assert (shown["virtual_tokens"] == 0) == (method == "prefix_plus")


def test_another_prefix_to_start_from_is_named_with_its_version(client: TestClient, frozen: FrozenModel) -> None:
    reply = client.post("/v1/prefixes/sums/train", json={"examples": EXAMPLES, "init_from": "absent"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (404, "init_from")
    for _ in range(2):
        uploaded = client.post("/v1/prefixes", data={"id": "first"}, files={"file": artefacts.native(frozen)})
        assert uploaded.status_code == 201, uploaded.text
    options = train(client, init_from="first")["options"]
    assert (options["init_from"], options["virtual_tokens"]) == ("default/first@2", 4)


def test_another_prefix_that_the_job_cannot_start_from_is_refused_at_once(
    client: TestClient, store: Store, frozen: FrozenModel
) -> None:
    for name, length in (("short", 4), ("long", frozen.context_length - 1)):
        store.prefixes.save("default", name, artefacts.manifest(frozen, length), {"self.kv": random_kv(frozen, length)})
    wrong = {
        "method prompt starts from a prefix of method prompt, and": {"init_from": "short", "method": "prompt"},
        "leave no room in a context of": {"init_from": "long"},
    }
    for words, options in wrong.items():
        reply = client.post("/v1/prefixes/sums/train", json={"examples": EXAMPLES, **options})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "init_from")
        assert words in reply.json()["error"]["message"]
    assert train(client, init_from="short", method="prefix_mlp")["options"]["virtual_tokens"] == 4
    assert len(client.get("/v1/jobs").json()["data"]) == 1


def test_an_unknown_option_is_named_with_the_nearest(client: TestClient) -> None:
    reply = client.post("/v1/prefixes/sums/train", json={"examples": EXAMPLES, "virtual_token": 3})
    assert reply.json()["error"]["message"] == "unknown field 'virtual_token'; did you mean 'virtual_tokens'?"


@pytest.mark.parametrize("name", ["Sums", "tiny-llama", "x" * 65])
def test_the_name_must_be_legal_and_not_the_model_s(client: TestClient, name: str, frozen: FrozenModel) -> None:
    reply = client.post(f"/v1/prefixes/{name}/train", json={"examples": EXAMPLES})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_name")


def test_jobs_are_listed_newest_first_in_pages(client: TestClient) -> None:
    ids = [train(client)["id"] for _ in range(3)]
    first = client.get("/v1/jobs", params={"limit": 2}).json()
    assert ([job["id"] for job in first["data"]], first["has_more"]) == ([ids[2], ids[1]], True)
    rest = client.get("/v1/jobs", params={"limit": 2, "after": ids[1]}).json()
    assert ([job["id"] for job in rest["data"]], rest["has_more"]) == ([ids[0]], False)


def test_a_running_job_shows_progress_and_events(client: TestClient, store: Store) -> None:
    job_id = train(client)["id"]
    claimed = store.jobs.claim("worker", 60)
    assert claimed is not None
    store.jobs.heartbeat(claimed, 60, {"step": 3})
    for step in (1, 2, 3):
        store.jobs.add_event(claimed, "metrics", {"step": step})
    shown = client.get(f"/v1/jobs/{job_id}").json()
    assert 0 <= shown["silent_seconds"] < 30
    assert shown["heartbeat_at"] >= shown["started_at"]
    found = store.jobs.job("default", job_id)
    assert found is not None
    silent = dataclasses.replace(found, heartbeat_at=time.time() - 31.5)
    assert views.job(silent)["silent_seconds"] == 31
    assert views.job(dataclasses.replace(silent, status=JobStatus.SUCCEEDED))["silent_seconds"] is None
    assert (shown["status"], shown["progress"], shown["attempt"]) == ("running", {"step": 3}, 1)
    page = client.get(f"/v1/jobs/{job_id}/events", params={"limit": 2}).json()
    assert ([event["data"]["step"] for event in page["data"]], page["has_more"]) == ([1, 2], True)
    rest = client.get(f"/v1/jobs/{job_id}/events", params={"after": page["data"][-1]["sequence"]}).json()
    assert [event["data"]["step"] for event in rest["data"]] == [3]


def test_cancel(client: TestClient, store: Store) -> None:
    job_id = train(client)["id"]
    assert client.post(f"/v1/jobs/{job_id}/cancel").json()["status"] == "cancelled"
    again = client.post(f"/v1/jobs/{job_id}/cancel")
    assert (again.status_code, again.headers["x-should-retry"]) == (409, "false")
    running = train(client)["id"]
    store.jobs.claim("worker", 60)
    assert client.post(f"/v1/jobs/{running}/cancel").json()["cancel_requested"] is True


def test_pause_and_resume(client: TestClient, store: Store) -> None:
    job_id = train(client)["id"]
    assert client.post(f"/v1/jobs/{job_id}/pause").json()["status"] == "paused"
    assert client.post(f"/v1/jobs/{job_id}/pause").status_code == 409
    assert client.post(f"/v1/jobs/{job_id}/resume").json()["status"] == "queued"
    assert client.post(f"/v1/jobs/{job_id}/resume").status_code == 409
    store.jobs.claim("worker", 60)
    shown = client.post(f"/v1/jobs/{job_id}/pause").json()
    assert (shown["status"], shown["pause_requested"]) == ("running", True)


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ""), ("GET", "/events"), ("GET", "/report"), ("POST", "/cancel"), ("POST", "/pause"), ("POST", "/resume")],
)
def test_an_unknown_job_is_404(client: TestClient, method: str, path: str) -> None:
    reply = client.request(method, f"/v1/jobs/ftjob-none{path}")
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "job_not_found")


def test_jobs_are_counted_by_state(client: TestClient) -> None:
    train(client)
    assert 'antefix_jobs{state="queued"} 1.0' in client.get("/metrics").text
