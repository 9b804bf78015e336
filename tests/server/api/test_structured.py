"""Structured output over HTTP: what is asked for by any of its names is what comes, and what is wrong is said."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal

import anyio
import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from starlette.testclient import TestClient

from prefix_store.store import Store
from tests.server.api.test_completions import chunks
from tests.server.conftest import Serve
from tests.server.live import Live, serving
from tests.server.over_http import serving as serving_http

MODEL = "tiny-llama"
CHAT = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}[assistant]"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Zoë"]}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
AS_OPENAI: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
PATHS = {
    "/generate": {"prompt": "x"},
    "/v1/completions": {"model": MODEL, "prompt": "x"},
    "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "x"}]},
}
MISSPELT = {"type": "object", "properties": {"name": {"type": "string", "maxLenght": 3}}}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    store = Store.open(f"sqlite:///{tmp_path_factory.mktemp('run')}/store.db")
    with serving(store) as made:
        made.frozen.tokenizer.chat_template = CHAT
        yield made
        made.client.app.state.services.grammars.close()  # type: ignore[attr-defined]
    store.close()


def ask(live: Live, path: str = "/generate", **body: Any) -> dict[str, Any]:
    reply = live.client.post(path, json={**PATHS[path], "max_tokens": 120, "seed": 3, **body})
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def texts(path: str, reply: dict[str, Any]) -> list[str]:
    choices = reply.get("choices", [reply])
    return [choice["message"]["content"] if path.endswith("chat/completions") else choice["text"] for choice in choices]


def refused(client: TestClient, path: str = "/generate", **body: Any) -> dict[str, Any]:
    reply = client.post(path, json={**PATHS[path], **body})
    assert reply.status_code == 400, reply.text
    found: dict[str, Any] = reply.json()["error"]
    return found


def is_person(text: str) -> bool:
    found = json.loads(text)
    return found.keys() == {"name", "age"} and found["name"] in ("Ada", "Zoë") and 0 <= found["age"] <= 150


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_has_the_form_that_was_asked_for(live: Live, path: str, temperature: float) -> None:
    def answer(**body: Any) -> str:
        return texts(path, ask(live, path, temperature=temperature, **body))[0]

    assert is_person(answer(response_format=AS_OPENAI))
    assert is_person(answer(structured_outputs={"json": SCHEMA}))
    assert is_person(answer(structured_outputs={"json": json.dumps(SCHEMA)}))
    assert re.fullmatch(r"[a-c]{4}\d", answer(structured_outputs={"regex": r"[a-c]{4}\d"}))
    assert answer(structured_outputs={"choice": ["yes", "nö"]}) in ("yes", "nö")
    assert re.fullmatch(r"<[0-9]>", answer(structured_outputs={"grammar": 'root ::= "<" [0-9] ">"'}))
    for objects in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        assert answer(**objects).startswith("{")
    # the model by itself would not say so
    for bare in (answer(), answer(response_format={"type": "text"}), answer(response_format=None)):
        with pytest.raises(ValueError):
            json.loads(bare)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_vllms_older_names_mean_the_same(live: Live, path: str) -> None:
    older = {
        "guided_regex": "[ab]{9}",
        "guided_json": SCHEMA,
        "guided_choice": ["a", "b"],
        "guided_grammar": "root ::= [a-z]",
    }
    for name, asked in older.items():
        newer = {"structured_outputs": {name.removeprefix("guided_"): asked}}
        assert texts(path, ask(live, path, **{name: asked})) == texts(path, ask(live, path, **newer))


@pytest.mark.parametrize("path", PATHS)
def test_a_streamed_answer_is_the_unstreamed_one(live: Live, path: str) -> None:
    for seed in range(4):
        asked = {"response_format": AS_OPENAI, "n": 2, "seed": seed, "temperature": 0.9}
        whole = ask(live, path, **asked)
        pieces: dict[int, str] = {}
        for chunk in chunks(live.client, path, **{**PATHS[path], "max_tokens": 120, **asked}):
            for choice in chunk.get("choices", [chunk]):
                delta = choice.get("delta", choice)
                pieces[choice["index"]] = pieces.get(choice["index"], "") + (
                    delta.get("content") or delta.get("text") or ""
                )
        assert [pieces[0], pieces[1]] == texts(path, whole)
        assert all(is_person(text) for text in pieces.values())


def test_choices_differ_and_each_is_what_its_own_seed_draws(live: Live) -> None:
    several = ask(live, structured_outputs={"regex": "[a-z]{20}"}, n=5, seed=10)
    found = texts("/generate", several)
    assert len(set(found)) == 5
    alone = [ask(live, structured_outputs={"regex": "[a-z]{20}"}, seed=10 + i)["text"] for i in range(5)]
    assert found == alone


def test_an_echoed_prompt_is_no_part_of_the_form(live: Live) -> None:
    reply = ask(live, "/v1/completions", structured_outputs={"regex": "[ab]{3}"}, echo=True, logprobs=1)
    assert re.fullmatch("x[ab]{3}", texts("/v1/completions", reply)[0])
    # the prompt's token behind its beginning, three of the answer, and the one that ended it
    assert len(reply["choices"][0]["logprobs"]["tokens"]) == 2 + 3 + 1


@pytest.mark.parametrize("path", PATHS)
def test_an_answer_that_is_cut_off_has_finish_reason_length(live: Live, path: str) -> None:
    cut = ask(live, path, response_format=AS_OPENAI, max_tokens=6)
    whole = ask(live, path, response_format=AS_OPENAI)
    reasons = [reply.get("choices", [reply])[0]["finish_reason"] for reply in (cut, whole)]
    assert reasons == ["length", "stop"]


def test_a_stop_string_ends_it_early(live: Live) -> None:
    reply = ask(live, response_format=AS_OPENAI, stop=[","])
    assert reply["finish_reason"] == "stop"
    assert re.search(r'"name"\s*:\s*"(Ada|Zoë)"\s*$', reply["text"])


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
        ({"response_format": "json"}, "response_format", "object"),
        ({"response_format": {}}, "response_format", "type"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema is missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format", "schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "foo"}}}},
            "response_format",
            "Invalid type: foo",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"strict": True, "schema": MISSPELT}}},
            "response_format",
            "'maxLenght' at properties.name is no keyword of JSON Schema; did you mean 'maxLength'?",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "one of json, regex, choice, grammar"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs", "one of json, regex, choice, grammar"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "one of"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs", "structural_tag"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs", "unclosed group"),
        ({"structured_outputs": {"regex": "a" * 200_000}}, "structured_outputs", "at most 131072 characters"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", "at least 1"),
        ({"structured_outputs": {"choice": [1]}}, "structured_outputs", "string"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs", "EOF"),
        ({"structured_outputs": {"json": []}}, "structured_outputs", "object"),
        (
            {"structured_outputs": {"json": {"type": "array", "items": {"type": "object", "minProperties": 2}}}},
            "structured_outputs",
            "2 is more than the 0 required properties",
        ),
        ({"structured_outputs": {"grammar": "nonsense"}}, "structured_outputs", ""),
        ({"response_format": AS_OPENAI, "structured_outputs": {"regex": "a"}}, "structured_outputs", "both"),
    ],
)
@pytest.mark.parametrize("path", PATHS)
def test_what_is_wrong_is_400_and_named(live: Live, path: str, body: dict[str, Any], param: str, said: str) -> None:
    found = refused(live.client, path, **body)
    assert found["param"].partition(".")[0] == param
    assert said in found["message"]
    assert len(found["message"]) < 500


@pytest.mark.parametrize("strict", [{}, {"strict": None}, {"strict": False}])
def test_a_schema_that_is_not_strict_may_have_keywords_that_are_none(live: Live, strict: dict[str, Any]) -> None:
    asked = {"type": "json_schema", "json_schema": {"schema": MISSPELT, **strict}}
    ask(live, prompt="x", max_tokens=1, response_format=asked)


def test_half_a_surrogate_pair_is_refused(live: Live) -> None:
    body = '{"prompt": "x", "structured_outputs": {"regex": "\\ud800"}}'
    reply = live.client.post("/generate", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400


def test_nothing_is_queued_when_a_grammar_is_refused(serve: Serve, loop: Any) -> None:
    client = serve()
    refused(client, structured_outputs={"regex": "(a"})
    assert loop.requests == []
    client.post("/generate", json={"prompt": "x", "structured_outputs": {"regex": "a"}, "n": 3})
    first, *rest = (request.grammar for request in loop.requests)
    assert first is not None
    assert all(other is first for other in rest)
    client.app.state.services.grammars.close()  # type: ignore[attr-defined]


def test_hostile_schemas_keep_nobody_waiting(store: Store) -> None:
    """Each takes half a second of another process; answers come meanwhile, and those in known grammars too."""
    with serving(store) as live, serving_http(live.client.app) as url, httpx.Client(base_url=url, timeout=60) as client:
        known = {"prompt": "x", "max_tokens": 9, "structured_outputs": {"regex": "[ab]{3}"}}
        assert client.post("/generate", json=known).status_code == 200
        codes: list[int] = []

        def attack(divisor: int) -> None:
            asked = {"prompt": "x", "structured_outputs": {"json": {"type": "integer", "multipleOf": divisor}}}
            codes.append(httpx.post(f"{url}/generate", json=asked, timeout=60).status_code)

        threads = [threading.Thread(target=attack, args=(99_999_989 + i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        waits = []
        while any(thread.is_alive() for thread in threads):
            begun = time.monotonic()
            assert client.post("/generate", json={"prompt": "x", "max_tokens": 2}).status_code == 200
            assert client.post("/generate", json=known).status_code == 200
            waits.append(time.monotonic() - begun)
        assert codes == [400, 400, 400]
        assert len(waits) > 3
        assert sorted(waits)[len(waits) // 2] < 0.5


@pytest.mark.anyio
async def test_a_tenant_waits_for_its_own_grammars_only(serve: Serve) -> None:
    """One of each tenant is in line, so who asks for many is not before others with all of them."""
    from server.api import structured

    services = serve().app.state.services  # type: ignore[attr-defined]
    order: list[str] = []

    def compile_slowly(tenant: str, source: Any, param: str) -> object:
        order.append(tenant)
        time.sleep(0.05)
        return object()

    services.grammars.compile = compile_slowly

    class Caller:
        def __init__(self, tenant: str) -> None:
            self.tenant = tenant

    async with anyio.create_task_group() as group:
        for index, tenant in enumerate(["a", "a", "a", "a", "b"]):
            outputs = structured.StructuredOutputs.model_validate({"regex": "a" * index})
            group.start_soon(structured.load, None, outputs, services, Caller(tenant))
            await anyio.sleep(0.005)
    assert order == ["a", "b", "a", "a", "a"]
    assert len(services.compiling_of) == 0


# A family of schemas whose answers are bounded, and an independent check of it.
Leaf = st.one_of(
    st.tuples(st.integers(-999, 999), st.integers(0, 500)).map(
        lambda pair: {"type": "integer", "minimum": pair[0], "maximum": pair[0] + pair[1]}
    ),
    st.lists(st.one_of(st.text(max_size=5), st.integers(-9, 9), st.booleans(), st.none()), min_size=1, max_size=4).map(
        lambda values: {"enum": values}
    ),
    st.integers(0, 6).map(lambda most: {"type": "string", "maxLength": most}),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
)


def _object(parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": parts, "required": list(parts)[::2], "additionalProperties": False}


Schemas = st.recursive(
    Leaf,
    lambda inner: st.one_of(
        st.dictionaries(st.text("abü_", min_size=1, max_size=3), inner, max_size=3).map(_object),
        st.tuples(inner, st.integers(0, 2)).map(lambda two: {"type": "array", "items": two[0], "maxItems": two[1]}),
        st.lists(inner, min_size=1, max_size=2).map(lambda options: {"anyOf": options}),
    ),
    max_leaves=4,
)


def follows(schema: dict[str, Any], value: Any) -> bool:
    if "enum" in schema:
        return any(value == one and type(value) is type(one) for one in schema["enum"])
    if "anyOf" in schema:
        return any(follows(option, value) for option in schema["anyOf"])
    kinds = {"integer": int, "string": str, "boolean": bool, "null": type(None), "object": dict, "array": list}
    if type(value) is not kinds[schema["type"]]:
        return False
    if schema["type"] == "integer":
        return bool(schema["minimum"] <= value <= schema["maximum"])
    if schema["type"] == "string":
        return len(value) <= schema["maxLength"]
    if schema["type"] == "array":
        return len(value) <= schema["maxItems"] and all(follows(schema["items"], item) for item in value)
    if schema["type"] == "object":
        parts = schema["properties"]
        known = set(schema["required"]) <= value.keys() <= parts.keys()
        return known and all(follows(parts[name], item) for name, item in value.items())
    return True


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=Schemas, seed=st.integers(0, 99), temperature=st.sampled_from([0.0, 0.8, 1.5]))
def test_every_answer_follows_its_schema(live: Live, schema: dict[str, Any], seed: int, temperature: float) -> None:
    asked = {"max_tokens": 480, "seed": seed, "temperature": temperature}
    reply = ask(live, response_format={"type": "json_schema", "json_schema": {"schema": schema}}, **asked)
    assert reply["finish_reason"] == "stop"
    value = json.loads(reply["text"])
    assert follows(schema, value), (schema, value)


class Pet(BaseModel):
    kind: Literal["cat", "dog"]
    age: Literal[1, 2, 3]
    friends: list[Literal["x", "y"]]


def test_openais_own_client_parses_answers_into_models(store: Store) -> None:
    openai = pytest.importorskip("openai")
    with (
        serving(store) as live,
        serving_http(live.client.app) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        live.frozen.tokenizer.chat_template = CHAT
        asked: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "seed": 5}
        found = client.chat.completions.parse(**asked, response_format=Pet, max_tokens=300)
        pet = found.choices[0].message.parsed
        assert isinstance(pet, Pet)
        assert Pet.model_validate_json(found.choices[0].message.content) == pet
        with client.chat.completions.stream(**asked, response_format=Pet, max_tokens=300) as stream:
            assert stream.get_final_completion().choices[0].message.parsed == pet
        with pytest.raises(openai.LengthFinishReasonError):
            client.chat.completions.parse(**asked, response_format=Pet, max_tokens=4)
