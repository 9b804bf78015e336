"""What is another tenant's is as if it were not there: every route, every way to name it, byte for byte."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from httpx import Response
from starlette.testclient import TestClient

from prefix_store.migration import FOLDERS
from prefix_store.model.frozen import FrozenModel
from prefix_store.store import Store
from server.app import create_app
from server.engine.prefix_loader import PrefixLoader
from tests.models import tiny_frozen
from tests.server import artefacts
from tests.server.api.test_auth import routes
from tests.server.fakes import FakeLoop

FROZEN = tiny_frozen("llama")
EXAMPLES = [{"prompt": "a", "completion": "b"}]
MESSAGES = [{"role": "user", "content": "x"}]
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
# What stands where an id does, and beside it what there is none of, in as many letters.
NAMES = [
    ("support", "missing"),
    ("acme/support", "acme/missing"),
    ("acme/support", "nope/support"),
    ("acme/support@1", "acme/missing@1"),
    ("acme/support@stable", "acme/missing@stable"),
    ("acme%2Fsupport", "acme%2Fmissing"),
    ("acme/shared", "acme/absent"),
]
JOBS = [("{job}", "ftjob-" + "0" * 24)]
FILES = [("{file}", "file-" + "0" * 27)]


@dataclass(frozen=True)
class Way:
    """One way to name an object of somebody's in a request: `<id>` in the path, or anywhere in the body."""

    ids: list[tuple[str, str]]
    path: str
    more: dict[str, Any] = field(default_factory=dict)

    def request(self, method: str, name: str) -> dict[str, Any]:
        more = json.loads(json.dumps(self.more).replace("<id>", name))
        return {"method": method, "url": self.path.replace("<id>", name), **more}


def prefix(path: str, **more: Any) -> Way:
    return Way(NAMES, path, more)


def job(path: str, **more: Any) -> Way:
    return Way(JOBS, path, more)


def file(path: str, **more: Any) -> Way:
    return Way(FILES, path, more)


NOTHING: list[Way] = []  # takes no id
# What a name means here is the caller's own, whoever else has it: see the second test.
OWN: list[Way] = []
WAYS: dict[tuple[str, str], list[Way]] = {
    ("GET", "/healthz"): NOTHING,
    ("GET", "/health"): NOTHING,
    ("GET", "/readyz"): NOTHING,
    ("GET", "/metrics"): NOTHING,
    ("POST", "/generate"): [prefix("/generate", json={"prompt": "x", "prefix_id": "<id>"})],
    ("POST", "/v1/prefixes"): OWN,
    ("PUT", "/v1/prefixes/{name}/content"): OWN,
    ("POST", "/v1/prefixes/{name}/train"): OWN,
    ("GET", "/v1/prefixes"): [prefix("/v1/prefixes?after=<id>"), prefix("/v1/prefixes?shared=true&after=<id>")],
    ("GET", "/v1/prefixes/{ref:path}"): [prefix("/v1/prefixes/<id>")],
    ("PATCH", "/v1/prefixes/{ref:path}"): [prefix("/v1/prefixes/<id>", json={"pinned": True})],
    ("DELETE", "/v1/prefixes/{ref:path}"): [
        prefix("/v1/prefixes/<id>", headers={"if-match": '"' + "0" * 64 + '"'}),
        prefix("/v1/prefixes/<id>"),
    ],
    ("GET", "/v1/prefixes/{ref:path}/export"): [prefix("/v1/prefixes/<id>/export?format=peft")],
    ("GET", "/v1/prefixes/{ref:path}/versions"): [prefix("/v1/prefixes/<id>/versions")],
    ("POST", "/v1/prefixes/{name}/rollback"): [
        prefix("/v1/prefixes/<id>/rollback", json={}),
        prefix("/v1/prefixes/<id>/rollback", json={"version": 1}),
    ],
    ("PUT", "/v1/prefixes/{name}/aliases/{alias}"): [prefix("/v1/prefixes/<id>/aliases/stable", json={"version": 1})],
    ("DELETE", "/v1/prefixes/{name}/aliases/{alias}"): [prefix("/v1/prefixes/<id>/aliases/stable")],
    ("GET", "/v1/prefixes/{name}/sharing"): [prefix("/v1/prefixes/<id>/sharing")],
    ("PUT", "/v1/prefixes/{name}/sharing"): [prefix("/v1/prefixes/<id>/sharing", json={"tenants": "all"})],
    ("GET", "/v1/prefixes/{ref:path}/inspect"): [prefix("/v1/prefixes/<id>/inspect?prompt=x")],
    ("POST", "/v1/prefixes/{ref:path}/verify"): [prefix("/v1/prefixes/<id>/verify")],
    ("POST", "/v1/prefixes/{ref:path}/preload"): [prefix("/v1/prefixes/<id>/preload")],
    ("POST", "/v1/prefixes/{ref:path}/release"): [prefix("/v1/prefixes/<id>/release")],
    ("GET", "/openapi.json"): NOTHING,
    ("GET", "/v1/model"): NOTHING,
    ("POST", "/v1/completions"): [prefix("/v1/completions", json={"model": "<id>", "prompt": "x"})],
    ("POST", "/v1/chat/completions"): [prefix("/v1/chat/completions", json={"model": "<id>", "messages": MESSAGES})],
    ("GET", "/v1/models"): NOTHING,
    ("GET", "/v1/models/{model:path}"): [prefix("/v1/models/<id>")],
    ("DELETE", "/v1/models/{model:path}"): [prefix("/v1/models/<id>")],
    ("POST", "/tokenize"): [prefix("/tokenize", json={"model": "<id>", "prompt": "x"})],
    ("POST", "/detokenize"): [prefix("/detokenize", json={"model": "<id>", "tokens": [70]})],
    ("GET", "/tokenizer_info"): NOTHING,
    ("GET", "/v1/jobs"): [job("/v1/jobs?after=<id>")],
    ("GET", "/v1/jobs/{job_id}"): [job("/v1/jobs/<id>")],
    ("GET", "/v1/jobs/{job_id}/events"): [job("/v1/jobs/<id>/events?after=0")],
    ("GET", "/v1/jobs/{job_id}/report"): [job("/v1/jobs/<id>/report")],
    ("POST", "/v1/jobs/{job_id}/cancel"): [job("/v1/jobs/<id>/cancel")],
    ("POST", "/v1/jobs/{job_id}/pause"): [job("/v1/jobs/<id>/pause")],
    ("POST", "/v1/jobs/{job_id}/resume"): [job("/v1/jobs/<id>/resume")],
    ("POST", "/v1/files"): NOTHING,
    ("GET", "/v1/files"): [file("/v1/files?after=<id>")],
    ("GET", "/v1/files/{file_id}"): [file("/v1/files/<id>")],
    ("DELETE", "/v1/files/{file_id}"): [file("/v1/files/<id>")],
    ("GET", "/v1/files/{file_id}/content"): [file("/v1/files/<id>/content")],
    ("POST", "/v1/fine_tuning/jobs"): [
        file("/v1/fine_tuning/jobs", json={"model": "tiny-llama", "training_file": "<id>"}),
        file("/v1/fine_tuning/jobs", json={"model": "tiny-llama", "training_file": "<id>", "validation_file": "<id>"}),
    ],
    ("GET", "/v1/fine_tuning/jobs"): [job("/v1/fine_tuning/jobs?after=<id>")],
    ("GET", "/v1/fine_tuning/jobs/{job_id}"): [job("/v1/fine_tuning/jobs/<id>")],
    ("GET", "/v1/fine_tuning/jobs/{job_id}/events"): [job("/v1/fine_tuning/jobs/<id>/events")],
    ("GET", "/v1/fine_tuning/jobs/{job_id}/checkpoints"): [job("/v1/fine_tuning/jobs/<id>/checkpoints")],
    ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel"): [job("/v1/fine_tuning/jobs/<id>/cancel")],
    ("POST", "/v1/fine_tuning/jobs/{job_id}/pause"): [job("/v1/fine_tuning/jobs/<id>/pause")],
    ("POST", "/v1/fine_tuning/jobs/{job_id}/resume"): [job("/v1/fine_tuning/jobs/<id>/resume")],
}


class Tenants:
    """A server where `acme` has something of every kind, and `other` has nothing."""

    def __init__(self, folder: Path, frozen: FrozenModel) -> None:
        self.store = Store.open(f"sqlite:///{folder}/store.db")
        loader = PrefixLoader(self.store.prefixes, frozen, 1 << 20)
        self.app = create_app(self.store, frozen, FakeLoop(lambda request: [70]), loader, chat_template=TEMPLATE)
        self.file = artefacts.native(frozen)
        self._client = TestClient(self.app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False)
        self._keys = {tenant: self.store.keys.create(tenant, ["admin"])[0] for tenant in ("acme", "other", "third")}
        for name in ("support", "shared"):
            assert self.by("acme", "PUT", f"/v1/prefixes/{name}/content", content=self.file).status_code == 201
        self.by("acme", "PUT", "/v1/prefixes/support/aliases/stable", json={"version": 1})
        self.by("acme", "PUT", "/v1/prefixes/shared/sharing", json={"tenants": ["third"]})
        reply = self.by("acme", "POST", "/v1/prefixes/sums/train", json={"examples": EXAMPLES})
        self.job: str = reply.json()["job"]["id"]
        form = {"data": {"purpose": "fine-tune"}, "files": {"file": ("f", b'{"text": "a"}')}}
        self.upload: str = self.by("acme", "POST", "/v1/files", **form).json()["id"]

    def by(self, tenant: str, method: str, url: str, headers: dict[str, str] | None = None, **more: Any) -> Response:
        allowed = {"authorization": f"Bearer {self._keys[tenant]}", "x-request-id": "same", **(headers or {})}
        return self._client.request(method, url, headers=allowed, **more)

    def real(self, name: str) -> str:
        """A name of the table's with the ids that came to be."""
        return name.replace("{job}", self.job).replace("{file}", self.upload)

    def owned(self) -> list[tuple[str, Any]]:
        """Every record of acme's, the audit log's too."""
        with self.store.backend.view() as view:
            records = [(f"{folder}/{key}", value) for folder in FOLDERS for key, value in view.scan(f"{folder}/")]
        return [(key, value) for key, value in records if "acme" in key or "acme" in json.dumps(value)]


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    made = Tenants(tmp_path_factory.mktemp("isolation"), FROZEN)
    yield made
    made.store.close()


def renamed(content: bytes, real: str, missing: str) -> bytes:
    return content.replace(real.encode(), missing.encode())


def test_every_route_is_in_the_table(tenants: Tenants) -> None:
    assert set(routes(tenants.app.routes)) == set(WAYS)


@pytest.mark.parametrize("route", [route for route, ways in WAYS.items() if ways], ids=" ".join)
def test_foreign_is_as_missing(tenants: Tenants, route: tuple[str, str]) -> None:
    before = tenants.owned()
    for way in WAYS[route]:
        for real, missing in way.ids:
            real = tenants.real(real)
            foreign, unknown = (tenants.by("other", **way.request(route[0], name)) for name in (real, missing))
            assert foreign.status_code == unknown.status_code
            assert foreign.status_code in (400, 404, 405) or foreign.json()["data"] == []
            assert renamed(renamed(foreign.content, real, missing), *map(unquote, (real, missing))) == unknown.content
            assert foreign.headers == unknown.headers
    assert tenants.owned() == before


@pytest.mark.parametrize("route", [route for route, ways in WAYS.items() if ways], ids=" ".join)
def test_the_table_s_requests_are_right(route: tuple[str, str], tmp_path: Path) -> None:
    """To their owner nothing is missing: else a wrong path would pass for isolation."""
    fresh = Tenants(tmp_path, FROZEN)
    for way in WAYS[route]:
        reply = fresh.by("acme", **way.request(route[0], fresh.real(way.ids[0][0])))
        assert reply.status_code in (200, 409, 412), reply.text
    fresh.store.close()


def test_a_name_that_another_has_is_free(tenants: Tenants) -> None:
    before = tenants.owned()
    form = {"data": {"id": "support"}, "files": {"file": ("f", tenants.file)}}
    made = tenants.by("other", "POST", "/v1/prefixes", **form).json()
    assert made["version"] == 1
    condition = {"if-match": f'"{made["digest"]}"'}
    reply = tenants.by("other", "PUT", "/v1/prefixes/support/content", condition, content=tenants.file)
    assert reply.json()["version"] == 2
    reply = tenants.by("other", "POST", "/v1/prefixes/sums/train", json={"examples": EXAMPLES})
    assert reply.json()["job"]["id"] != tenants.job
    assert tenants.by("other", "DELETE", "/v1/prefixes/support").json()["versions"] == [1, 2]
    assert tenants.owned() == before
    assert tenants.by("acme", "GET", "/v1/prefixes/support/export").content == tenants.file
    # a name of its own that was deleted is missing like any other
    gone, unknown = (tenants.by("other", "GET", f"/v1/prefixes/{name}") for name in ("support", "missing"))
    assert gone.content.replace(b"support", b"missing") == unknown.content
