from typing import Any

import pytest
from starlette.testclient import TestClient

from prefix_store.jobs import JobStatus
from prefix_store.store import Store
from server.api import limits

DATA = b'{"prompt": "2+2=", "completion": "4"}\n\n{"text": "ok"}\n'
FIELDS = {
    *("id", "object", "bytes", "created_at", "expires_at", "filename", "purpose", "status", "status_details"),
}


def upload(client: TestClient, data: bytes = DATA, purpose: str = "fine-tune", name: str = "data.jsonl", **more: Any):
    return client.post("/v1/files", data={"purpose": purpose}, files={"file": (name, data)}, **more)


def finished(client: TestClient, store: Store, name: str = "sums") -> str:
    """A job that has ended, with a curve."""
    job_id = client.post(f"/v1/prefixes/{name}/train", json={"examples": [{"text": "a"}]}).json()["job"]["id"]
    job = store.jobs.claim("w", 60.0)
    assert job is not None
    for step in (1, 2):
        store.jobs.add_event(job, "metrics", {"step": step, "train_loss": 1 / step, "valid_loss": None, "odd": 1})
    store.jobs.finish(job, JobStatus.FAILED, None)
    return str(job_id)


def test_a_file_is_shown_as_openai_shows_it_and_comes_back_as_it_came(client: TestClient) -> None:
    reply = upload(client, name="my ‘data’.jsonl")
    assert reply.status_code == 200, reply.text
    made = reply.json()
    assert set(made) == FIELDS
    assert (made["object"], made["bytes"], made["purpose"]) == ("file", len(DATA), "fine-tune")
    assert (made["filename"], made["status"]) == ("my ‘data’.jsonl", "processed")
    assert client.get(f"/v1/files/{made['id']}").json() == made
    content = client.get(f"/v1/files/{made['id']}/content")
    assert (content.content, content.headers["content-type"]) == (DATA, "application/octet-stream")
    assert content.headers["content-disposition"] == f'attachment; filename="{made["id"]}"'
    gone = client.delete(f"/v1/files/{made['id']}")
    assert gone.json() == {"id": made["id"], "object": "file", "deleted": True}
    for reply in (client.get(f"/v1/files/{made['id']}"), client.delete(f"/v1/files/{made['id']}")):
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "file_not_found")


def test_lists_are_paged_from_the_newest_on(client: TestClient) -> None:
    ids = [upload(client).json()["id"] for _ in range(3)]
    newest = sorted(ids, reverse=True)  # as they came, but within a millisecond
    whole = client.get("/v1/files").json()
    assert [file["id"] for file in whole["data"]] == newest
    assert (whole["object"], whole["has_more"]) == ("list", False)
    assert (whole["first_id"], whole["last_id"]) == (newest[0], newest[-1])
    first = client.get("/v1/files", params={"limit": 2, "purpose": "fine-tune"}).json()
    assert ([file["id"] for file in first["data"]], first["has_more"]) == (newest[:2], True)
    rest = client.get("/v1/files", params={"limit": 2, "after": newest[1]}).json()
    assert ([file["id"] for file in rest["data"]], rest["has_more"]) == (newest[2:], False)
    rising = client.get("/v1/files", params={"order": "asc"}).json()
    assert [file["id"] for file in rising["data"]] == newest[::-1]
    found = client.get("/v1/files", params={"purpose": "batch"}).json()
    assert found == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}
    for odd in ({"after": "file-x"}, {"limit": 0}, {"limit": 10_001}, {"order": "up"}):
        assert client.get("/v1/files", params=odd).status_code == 400


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"text": "a"}\n{"prompt": "a"}\n', "line 2: expected an object"),
        (b"[1]\nx\n", "line 1: expected an object"),
        (b"", "no examples"),
    ],
)
def test_what_cannot_be_trained_on_is_400_with_the_line(client: TestClient, data: bytes, words: str) -> None:
    reply = upload(client, data)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (400, "invalid_training_file", "file")
    assert words in error["message"]
    assert client.get("/v1/files").json()["data"] == []


@pytest.mark.parametrize("purpose", ["batch", "fine-tune-results", "assistants", "", "Fine-Tune"])
def test_other_purposes_are_refused(client: TestClient, purpose: str) -> None:
    reply = upload(client, purpose=purpose)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "purpose")


def test_what_a_form_may_not_hold_is_refused_by_name(client: TestClient) -> None:
    form = {"purpose": "fine-tune", "expires_after[anchor]": "created_at"}
    reply = client.post("/v1/files", data=form, files={"file": ("f", DATA)})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "expires_after[anchor]")
    assert client.post("/v1/files", data={"purpose": "fine-tune"}).status_code == 400
    assert client.post("/v1/files", json={"purpose": "fine-tune"}).status_code == 400


def test_an_upload_may_be_as_large_as_training_data(client: TestClient) -> None:
    most = limits.TRAINING_BYTES + limits.FORM_BYTES
    reply = client.post("/v1/files", content=b"", headers={"content-length": str(most + 1)})
    assert reply.status_code == 413
    line = b'{"text": "' + b"a" * limits.JSON_BYTES + b'"}\n'
    assert upload(client, line).json()["bytes"] == len(line) > limits.JSON_BYTES


def test_the_quota_of_bytes_counts_files(client: TestClient, store: Store) -> None:
    store.tenants.create("default")
    store.tenants.set_quotas("default", {"bytes": len(DATA)})
    made = upload(client)
    reply = upload(client)
    assert (made.status_code, reply.status_code, reply.json()["error"]["code"]) == (200, 403, "quota_exceeded")
    client.delete(f"/v1/files/{made.json()['id']}")
    assert upload(client).status_code == 200


def test_an_upload_that_is_repeated_is_one(client: TestClient) -> None:
    headers = {"idempotency-key": "k"}
    first, again = (upload(client, headers=headers) for _ in range(2))
    assert first.json() == again.json()
    assert again.headers["idempotent-replayed"] == "true"
    assert len(client.get("/v1/files").json()["data"]) == 1
    assert upload(client, b'{"text": "other"}', headers=headers).status_code == 422


def test_a_digest_that_does_not_match_keeps_nothing(client: TestClient) -> None:
    assert upload(client, headers={"x-content-sha256": "0" * 64}).status_code == 400
    assert client.get("/v1/files").json()["data"] == []


# results of jobs


def test_a_jobs_results_are_a_file_of_its_curve(client: TestClient, store: Store) -> None:
    file_id = f"file-{finished(client, store)}"
    shown = client.get(f"/v1/files/{file_id}").json()
    content = client.get(f"/v1/files/{file_id}/content").text
    assert content == "step,train_loss,valid_loss,learning_rate,tokens_per_second\n1,1.0,,,\n2,0.5,,,\n"
    assert set(shown) == FIELDS
    assert (shown["purpose"], shown["bytes"]) == ("fine-tune-results", len(content))
    reply = client.delete(f"/v1/files/{file_id}")
    assert (reply.status_code, reply.json()["error"]["code"]) == (409, "conflict")


def test_a_job_that_has_not_ended_has_no_results(client: TestClient) -> None:
    job = client.post("/v1/prefixes/sums/train", json={"examples": [{"text": "a"}]}).json()["job"]["id"]
    cancelled = client.post("/v1/prefixes/sums/train", json={"examples": [{"text": "a"}]}).json()["job"]["id"]
    client.post(f"/v1/jobs/{cancelled}/cancel")
    for job_id in (job, cancelled, "ftjob-" + "0" * 24):
        for path in (f"/v1/files/file-{job_id}", f"/v1/files/file-{job_id}/content"):
            assert client.get(path).status_code == 404
        assert client.delete(f"/v1/files/file-{job_id}").status_code == 404


def test_anothers_results_are_missing(client: TestClient, store: Store) -> None:
    file_id = f"file-{finished(client, store)}"
    key, _ = store.keys.create("other", ["train"])
    allowed = {"authorization": f"Bearer {key}", "x-request-id": "same"}
    for path in ("", "/content"):
        foreign = client.get(f"/v1/files/{file_id}{path}", headers=allowed)
        missing = client.get(f"/v1/files/file-ftjob-{'0' * 24}{path}", headers=allowed)
        assert foreign.status_code == missing.status_code == 404
        assert foreign.text.replace(file_id, f"file-ftjob-{'0' * 24}") == missing.text
