"""The OpenAPI document is complete, its examples are true, and what schemathesis makes of it is answered as it says.

`ANTEFIX_FUZZ=200` in the environment of the tests asks for as many requests of every operation, instead of a few.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from pydantic import TypeAdapter
from schemathesis.checks import not_a_server_error
from schemathesis.core.control import SkipTest
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from prefix_store.store import Store
from server.api import auth, openapi
from server.api.documented import ROWS
from tests.models import tiny_frozen
from tests.server import artefacts, over_http
from tests.server.live import Live, serving

FROZEN = tiny_frozen("llama")
EXAMPLES = int(os.environ.get("ANTEFIX_FUZZ", "4"))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
# What the document's examples name.
PLACES = {"ref": "plays", "name": "plays", "model": "plays", "alias": "stable"}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder: Path = tmp_path_factory.mktemp("openapi")
    store = Store.open(f"sqlite:///{folder}/store.db")
    with serving(store, chat_template="{{ messages[0].content }}") as running:
        yield running


@pytest.fixture(scope="module")
def url(live: Live) -> Iterator[str]:
    with over_http.serving(live.client.app) as address:
        yield address


@pytest.fixture(scope="module")
def document(live: Live) -> dict[str, Any]:
    found: dict[str, Any] = live.client.get("/openapi.json").json()
    return found


def operations(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (method.upper(), path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def furnish(live: Live) -> dict[str, str]:
    """What the examples name is there; the ids of a file and of a job that waits."""
    for seed_ in (1, 2):
        live.publish("plays", artefacts.native(FROZEN, 6, seed=seed_))
    live.publish("gone", artefacts.native(FROZEN, 6, seed=1))
    live.client.put("/v1/prefixes/plays/aliases/stable", json={"version": 1})
    examples = [{"prompt": "a", "completion": "b"}]
    job = live.client.post("/v1/prefixes/mine/train", json={"examples": examples}).json()["job"]["id"]
    file = b'{"prompt": "a", "completion": "b"}'
    made = live.client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", file)})
    return {"job_id": job, "file_id": made.json()["id"]}


def named(route: tuple[str, str], made: dict[str, str]) -> dict[str, str]:
    """What stands in a path, of what is there; what is deleted is not what others look at."""
    method, path = route
    places = PLACES | made
    if method == "DELETE" and "alias" not in path:
        places |= {"ref": "gone", "model": "gone"}
    return {name: value for name, value in places.items() if f"{{{name}}}" in path}


def test_every_route_is_in_it_with_its_errors_and_examples(document: dict[str, Any]) -> None:
    found = operations(document)
    assert set(found) == set(ROWS)
    keyed = {(method, path.replace(":path", "")) for method, path in auth.SCOPES}
    assert keyed | {("GET", path) for path in auth.OPEN} == set(found)
    for route, operation in found.items():
        row = ROWS[route]
        statuses = set(operation["responses"])
        assert (route[1] in auth.OPEN) == (not {"400", "401", "403", "429", "500", "503"} <= statuses), route
        for status, reply in operation["responses"].items():
            assert reply["description"]
            if status == "304":
                continue
            for media in reply["content"].values():
                assert "schema" in media
            first = next(iter(reply["content"].values()))
            assert first["example"] is not None, (route, status)
            if int(status) >= 400 and route != ("GET", "/readyz"):
                assert first["schema"] == {"$ref": "#/components/schemas/Error"}
                assert set(first["example"]["error"]) == {"message", "type", "param", "code"}
        if row.body is not None:
            assert operation["requestBody"]["content"]["application/json"]["example"] == row.body_example
            assert {"408", "413"} <= statuses
        assert ("security" in operation) == (route[1] not in auth.OPEN)


def test_it_says_how_many_choices_there_may_be(live: Live, document: dict[str, Any]) -> None:
    for body, path in (("GenerateBody", "/generate"), ("CompletionBody", "/v1/completions")):
        field = document["components"]["schemas"][body]["properties"]["n"]
        counted = field.get("anyOf", [field])[0]
        assert (counted["minimum"], counted["maximum"]) == (1, 64)
        asked = {"model": FROZEN.name} if path.startswith("/v1") else {}
        reply = live.client.post(path, json={**asked, "prompt": "x", "n": 65})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "n")
    assert document["components"]["schemas"]["ChatBody"]["properties"]["n"] == field


@pytest.mark.parametrize("route", ROWS, ids=" ".join)
def test_an_example_is_of_its_shape(route: tuple[str, str]) -> None:
    row = ROWS[route]
    if not isinstance(row.reply, str):
        TypeAdapter(row.reply).validate_python(row.reply_example)
    if row.body is not None:
        row.body.model_validate(row.body_example)


@pytest.mark.parametrize("route", ROWS, ids=" ".join)
def test_an_example_is_answered_as_it_says(
    live: Live, url: str, document: dict[str, Any], route: tuple[str, str]
) -> None:
    """The one request of each route that does what the route is for."""
    made = furnish(live)
    method, path = route
    schema = schemathesis.openapi.from_dict(document)
    operation = schema[path][method]
    places = named(route, made)
    if method == "POST" and path.endswith("/resume"):
        live.client.post(f"/v1/jobs/{made['job_id']}/pause")
    more: dict[str, Any] = {"path_parameters": places}
    if route in openapi.FILES:
        return  # `furnish` has sent one
    if ROWS[route].body is not None:
        uploaded = {"training_file": made["file_id"]} if "training_file" in ROWS[route].body_example else {}
        more |= {"body": ROWS[route].body_example | uploaded, "media_type": "application/json"}
    case = operation.Case(**more)
    reply = case.call(base_url=url)
    assert reply.status_code == ROWS[route].status, reply.content
    case.validate_response(reply, checks=CHECKS)
    if not isinstance(ROWS[route].reply, str):  # schemathesis lets fields pass that the document does not have
        TypeAdapter(ROWS[route].reply).validate_json(reply.content, extra="forbid")


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("route", ROWS, ids=" ".join)
def test_what_schemathesis_makes_of_it_is_answered_as_documented(
    live: Live, url: str, document: dict[str, Any], route: tuple[str, str], mode: GenerationMode
) -> None:
    """No failure of the server's, no status or shape that the document does not have."""
    schema = schemathesis.openapi.from_dict(document)
    schema.config.generation.update(modes=[mode])
    operation = schema[route[1]][route[0]]
    made = furnish(live)
    places = named(route, made) if mode is GenerationMode.POSITIVE else {}

    @seed(7)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode, path_parameters=places or None))
    def check(case: schemathesis.Case) -> None:
        case.validate_response(case.call(base_url=url), checks=CHECKS)

    with suppress(SkipTest):  # whatever is sent to some routes fits their schemas
        check()


def test_a_status_that_is_left_out_and_a_field_of_another_type_are_found(
    live: Live, url: str, document: dict[str, Any]
) -> None:
    """The control: with these checks the test above can fail."""
    furnish(live)
    changed = copy.deepcopy(document)
    del changed["paths"]["/v1/prefixes/{ref}"]["get"]["responses"]["404"]
    changed["components"]["schemas"]["Prefix"]["properties"]["digest"] = {"type": "integer"}
    operation = schemathesis.openapi.from_dict(changed)["/v1/prefixes/{ref}"]["GET"]
    for name, failure in (("missing", "Undocumented status code"), ("plays", "Response violates schema")):
        case = operation.Case(path_parameters={"ref": name})
        with pytest.raises(BaseExceptionGroup) as caught:
            case.validate_response(case.call(base_url=url), checks=CHECKS)
        assert failure in str([error.title for error in caught.value.exceptions])


def test_ranges_and_nulls_are_those_that_are_taken(live: Live, document: dict[str, Any]) -> None:
    """At both ends of each range, and nowhere beyond; null wherever it is said to be one."""
    fields = document["components"]["schemas"]["CompletionBody"]["properties"]
    body = {"model": FROZEN.name, "prompt": "x", "max_tokens": 1}

    def status(**changes: Any) -> int:
        return live.client.post("/v1/completions", json={**body, **changes}).status_code

    for name in ("temperature", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        number, null = fields[name]["anyOf"]
        assert (status(**{name: number["minimum"]}), status(**{name: number["maximum"]})) == (200, 200), name
        assert status(**{name: number["minimum"] - 1}) == status(**{name: number["maximum"] + 1}) == 400, name
        assert null == {"type": "null"}
    nullable = [name for name, field in fields.items() if {"type": "null"} in field.get("anyOf", [])]
    assert set(nullable) == set(fields) - {"model", "prompt"}
    assert status(**dict.fromkeys(nullable)) == 200


def test_headers_and_codes_are_told_of(document: dict[str, Any]) -> None:
    for (method, path), operation in operations(document).items():
        for status, reply in operation["responses"].items():
            assert "x-request-id" in reply["headers"], (method, path, status)
            assert ("retry-after" in reply["headers"]) == (status in ("429", "503"))
    replies = document["paths"]["/v1/completions"]["post"]["responses"]
    assert "x-ratelimit-remaining-tokens" in replies["200"]["headers"]
    examples = [
        document["paths"][path][method]["responses"]["404"]["content"]["application/json"]["example"]["error"]["code"]
        for path, method in (("/v1/completions", "post"), ("/v1/prefixes/{ref}", "get"), ("/v1/files/{file_id}", "get"))
    ]
    assert examples == ["model_not_found", "prefix_not_found", "file_not_found"]
