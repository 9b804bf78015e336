"""Every list goes on behind the last one of the page before, and refuses what could not be that."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from prefix_store.model.frozen import FrozenModel
from prefix_store.store import Store
from server.api.documented import ROWS
from tests.server.api.test_auth import key
from tests.server.api.test_fine_tuning import publish as finish
from tests.server.api.test_generate import publish

FILE = b'{"prompt": "a", "completion": "b"}'
EXAMPLES = [{"prompt": "a", "completion": "b"}]
WRONG = {
    "/v1/prefixes": ["No Name", "a/b", "a@1", "x" * 65],
    "/v1/prefixes?shared=true": ["No Name", "a/b/c", "a/b@1", "/"],
    "/v1/prefixes/{ref}/versions": ["a", "-1", "1.5"],
    "/v1/jobs": ["none", "ftjob-none", "", "@foreign"],
    "/v1/jobs/{job_id}/events": ["none", "-1", ""],
    "/v1/files": ["none", "file-none", "", "@job"],
    "/v1/fine_tuning/jobs": ["none", "ftjob-none", "", "@foreign"],
    "/v1/fine_tuning/jobs/{job_id}/events": ["none", "ftevent-none-1", "@event0", "@event99", "@other_event", ""],
    "/v1/fine_tuning/jobs/{job_id}/checkpoints": ["none", "ftckpt-none", "@event1", ""],
}


@pytest.fixture
def there(client: TestClient, store: Store, frozen: FrozenModel) -> dict[str, str]:
    """Two of each, and what to call them; the first job has made something."""
    for name in ("a", "b"):
        publish(store, frozen, name)
    publish(store, frozen, "a", template="{prompt}!")
    files = [client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("f", FILE)}) for _ in "ab"]
    jobs = [
        client.post(f"/v1/prefixes/{name}x/train", json={"examples": EXAMPLES}).json()["job"]["id"] for name in "ab"
    ]
    foreign = store.jobs.submit("other", "x", EXAMPLES, {}).id
    claimed = store.jobs.claim("worker", 60)
    assert claimed is not None
    assert claimed.id == jobs[0]
    for text in ("first", "second"):
        store.jobs.add_event(claimed, "message", {"message": text})
    finish(store, frozen, claimed)
    events = {f"event{number}": f"ftevent-{jobs[0].removeprefix('ftjob-')}-{number}" for number in (0, 1, 99)}
    other = f"ftevent-{jobs[1].removeprefix('ftjob-')}-1"
    return {
        **{"ref": "a", "job_id": jobs[0], "job": jobs[0], "foreign": foreign, "file": files[0].json()["id"]},
        **{"other_event": other, **events},
    }


def page(client: TestClient, there: dict[str, str], path: str, **params: Any) -> Any:
    route, _, query = path.partition("?")
    more = dict([query.split("=")]) if query else {}
    return client.get(route.format(**there), params={**more, **params})


def test_these_are_all_lists() -> None:
    listing = {path for (method, path), row in ROWS.items() if method == "GET" and "has_more" in str(row.reply_example)}
    assert listing == {path.partition("?")[0] for path in WRONG}


@pytest.mark.parametrize("path", WRONG)
def test_what_no_page_ended_with_is_400(client: TestClient, there: dict[str, str], path: str) -> None:
    for after in WRONG[path]:
        reply = page(client, there, path, after=there[after[1:]] if after.startswith("@") else after)
        assert (reply.status_code, reply.json().get("error", {}).get("param")) == (400, "after"), after


@pytest.mark.parametrize("path", WRONG)
def test_pages_of_one_are_the_whole(client: TestClient, store: Store, there: dict[str, str], path: str) -> None:
    whole = page(client, there, path).json()["data"]
    assert whole or "shared" in path
    found: list[Any] = []
    for expected in whole:
        last = found[-1] if found else {}
        after = last.get("version") if "versions" in path else last.get("sequence", last.get("id"))
        part = page(client, there, path, limit=1, **({"after": after} if found else {})).json()
        assert part["data"] == [expected]
        found += part["data"]
        assert part["has_more"] == (len(found) < len(whole))


def test_a_list_goes_on_behind_what_was_deleted_since(client: TestClient, there: dict[str, str]) -> None:
    client.delete("/v1/prefixes/a")
    assert [item["id"] for item in page(client, there, "/v1/prefixes", after="a").json()["data"]] == ["ax", "b"]
    client.delete(f"/v1/files/{there['file']}")
    assert page(client, there, "/v1/files", after=there["file"]).json()["data"] == []
    assert len(page(client, there, "/v1/files", after=there["file"], order="asc").json()["data"]) == 1


def test_what_others_share_goes_by_tenant_and_name(
    client: TestClient, store: Store, frozen: FrozenModel, there: dict[str, str]
) -> None:
    for name in ("a", "b"):
        store.prefixes.share("default", name, ["acme"])
    acme = key(store, "prefix:read")
    for after, expected in (("default/a", ["b"]), ("default/b", []), ("default", ["a", "b"])):
        reply = client.get("/v1/prefixes", params={"shared": True, "after": after}, headers=acme)
        assert [item["id"] for item in reply.json()["data"]] == expected
