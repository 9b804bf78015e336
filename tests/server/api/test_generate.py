import json
import threading
import time
from typing import Any

import pytest
from starlette.testclient import TestClient

from prefix_store.errors import GenerationFailed, OutOfMemory, Overloaded, PrefixNumerics
from prefix_store.model.frozen import FrozenModel
from prefix_store.model.prompt import encode
from prefix_store.store import Store
from prefix_store.tenants import DEFAULT_TENANT
from server.engine.kv_pool import memory_slots
from tests.server import artefacts
from tests.server.conftest import ANSWER, Serve
from tests.server.fakes import FakeLoop

PREFIX_LENGTH = 4


@pytest.fixture
def prefix(store: Store, frozen: FrozenModel) -> str:
    publish(store, frozen)
    return "support"


def publish(store: Store, frozen: FrozenModel, name: str = "support", **changes: Any) -> None:
    manifest = artefacts.manifest(frozen, PREFIX_LENGTH, **changes)
    store.prefixes.save(DEFAULT_TENANT, name, manifest, {"self.kv": artefacts.random_kv(frozen, PREFIX_LENGTH)})


def events(client: TestClient, **body: Any) -> list[dict[str, Any]]:
    reply = client.post("/generate", json={"stream": True, **body})
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert "\r" not in reply.text
    *blocks, end = reply.text.split("\n\n")
    assert (blocks.pop(), end) == ("data: [DONE]", "")
    assert all(block.startswith("data: ") for block in blocks)
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def error(client: TestClient, **body: Any) -> dict[str, Any]:
    reply = client.post("/generate", json=body)
    assert reply.status_code == 400, reply.text
    found: dict[str, Any] = reply.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


def test_the_whole_reply(client: TestClient, prefix: str, loop: FakeLoop) -> None:
    reply = client.post("/generate", json={"prompt": "hi", "prefix_id": prefix}).json()
    assert reply["id"].startswith("gen-")
    assert (reply["text"], reply["finish_reason"]) == (ANSWER, "stop")
    assert (reply["prefix"]["id"], reply["prefix"]["version"], len(reply["prefix"]["digest"])) == ("support", 1, 64)
    assert reply["usage"] == {"prompt_tokens": 3, "completion_tokens": len(ANSWER.encode()), "virtual_tokens": 4}
    assert 0 < reply["timings"]["time_to_first_token_ms"] <= reply["timings"]["total_ms"]
    assert "choices" not in reply
    assert "logprobs" not in reply
    assert loop.requests[0].prefix.virtual_tokens == PREFIX_LENGTH


def test_without_prefix_id_the_bare_model_answers(client: TestClient, loop: FakeLoop) -> None:
    for body in ({"prompt": "hi"}, {"prompt": "hi", "prefix_id": None}):
        reply = client.post("/generate", json=body).json()
        assert reply["prefix"] is None
        assert reply["usage"]["virtual_tokens"] == 0
    assert [request.prefix for request in loop.requests] == [None, None]


@pytest.mark.parametrize("options", [{}, {"stop": "你"}, {"stop": ["x", "wör"]}, {"max_tokens": 6}, {"echo": True}])
def test_streamed_and_whole_replies_agree(client: TestClient, prefix: str, options: dict[str, Any]) -> None:
    body = {"prompt": "hi", "prefix_id": prefix, **options}
    whole = client.post("/generate", json=body).json()
    *pieces, last = events(client, **body)
    assert "".join(piece["text"] for piece in [*pieces, last]) == whole["text"]
    assert [piece["finish_reason"] for piece in pieces] == [None] * len(pieces)
    assert all(set(piece) == {"id", "index", "text", "finish_reason"} for piece in pieces)
    assert {key: last[key] for key in ("finish_reason", "prefix", "usage")} == {
        key: whole[key] for key in ("finish_reason", "prefix", "usage")
    }
    assert "timings" in last


def test_a_stop_string_ends_the_text_before_itself_and_the_work(client: TestClient, loop: FakeLoop) -> None:
    loop.hold.clear()
    threading.Timer(0.05, loop.hold.set).start()
    reply = client.post("/generate", json={"prompt": "hi", "stop": "wör"}).json()
    assert (reply["text"], reply["finish_reason"]) == ("Hällo ", "stop")
    assert reply["usage"]["completion_tokens"] == len("Hällo wör".encode())
    assert loop.aborted == [loop.requests[0].id]


def test_several_choices_have_seeds_of_their_own(client: TestClient, loop: FakeLoop) -> None:
    reply = client.post("/generate", json={"prompt": "hi", "n": 3, "seed": 2**63 - 1}).json()
    assert [request.params.seed for request in loop.requests] == [2**63 - 1, -(2**63), -(2**63) + 1]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    assert (reply["text"], reply["finish_reason"]) == (ANSWER, "stop")
    assert reply["usage"]["prompt_tokens"] == 3
    assert reply["usage"]["completion_tokens"] == 3 * len(ANSWER.encode())


def test_streamed_choices_carry_their_index_and_only_the_last_event_the_usage(client: TestClient) -> None:
    streamed = events(client, prompt="hi", n=2)
    for index in (0, 1):
        assert "".join(event["text"] for event in streamed if event["index"] == index) == ANSWER
    assert [event for event in streamed if "usage" in event] == streamed[-1:]
    assert [event["finish_reason"] for event in streamed].count("stop") == 2


def test_logprobs_are_four_parallel_lists(client: TestClient) -> None:
    body = {"prompt": "hi", "logprobs": 2, "echo": True, "max_tokens": 3}
    reply = client.post("/generate", json=body).json()
    logprobs = reply["logprobs"]
    assert reply["text"] == "hiHä"
    assert logprobs["tokens"][1:4] == ["h", "i", "H"]
    assert {len(entries) for entries in logprobs.values()} == {6}
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
    assert logprobs["top_logprobs"][3] == {"H": -0.5, "I": -1.5}
    streamed = [event["logprobs"] for event in events(client, **body) if "logprobs" in event]
    joined = {key: [entry for part in streamed for entry in part[key]] for key in logprobs}
    assert joined == logprobs


def test_token_ids_are_taken_as_they_are(client: TestClient, frozen: FrozenModel, loop: FakeLoop) -> None:
    ids = encode(frozen.tokenizer, "hi")[1:]
    reply = client.post("/generate", json={"prompt": ids, "echo": True}).json()
    assert loop.requests[0].prompt_ids == tuple(ids)
    assert reply["text"] == "hi" + ANSWER


def test_an_empty_prompt_becomes_bos(client: TestClient, frozen: FrozenModel, loop: FakeLoop) -> None:
    for prompt in ("", []):
        client.post("/generate", json={"prompt": prompt})
    assert [request.prompt_ids for request in loop.requests] == [(frozen.tokenizer.bos_token_id,)] * 2


def test_the_template_of_a_prefix_goes_around_text_prompts_only(
    client: TestClient, store: Store, frozen: FrozenModel, loop: FakeLoop
) -> None:
    publish(store, frozen, template="Q: {prompt} A:")
    client.post("/generate", json={"prompt": "hi", "prefix_id": "support"})
    client.post("/generate", json={"prompt": [5, 6], "prefix_id": "support"})
    assert frozen.tokenizer.decode(loop.requests[0].prompt_ids, skip_special_tokens=True) == "Q: hi A:"
    assert loop.requests[1].prompt_ids == (5, 6)


def test_max_tokens_defaults_to_the_room_there_is(client: TestClient, frozen: FrozenModel, loop: FakeLoop) -> None:
    client.post("/generate", json={"prompt": "hi"})
    client.post("/generate", json={"prompt": [5] * (frozen.context_length - 10)})
    client.post("/generate", json={"prompt": [5] * frozen.context_length})
    assert [request.params.max_tokens for request in loop.requests] == [128, 10, 1]


def test_a_prompt_that_could_never_fit_is_refused_unread(client: TestClient, frozen: FrozenModel) -> None:
    for prompt in ([5] * (frozen.context_length + 1), "x" * (256 * frozen.context_length + 1)):
        found = error(client, prompt=prompt)
        assert (found["code"], found["param"]) == ("context_length_exceeded", "prompt")


def test_sampling_fields_reach_the_engine(client: TestClient, loop: FakeLoop) -> None:
    asked = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 3, "ignore_eos": True, "logprobs": 0}
    asked |= {"repetition_penalty": 1.2, "presence_penalty": -0.5, "frequency_penalty": 0.5, "min_tokens": 2}
    before = time.monotonic()
    client.post("/generate", json={"prompt": "hi", "stop_token_ids": [9], "timeout_s": 5, "user": "u", **asked})
    (request,) = loop.requests
    assert {name: getattr(request.params, name) for name in asked} == asked
    assert request.params.stop_token_ids == {9}
    assert before + 5 <= request.deadline <= time.monotonic() + 5


def test_a_bias_reaches_the_engine_by_token_id(client: TestClient, loop: FakeLoop) -> None:
    client.post("/generate", json={"prompt": "hi", "logit_bias": {"7": -100, "9": 2.5}})
    client.post("/generate", json={"prompt": "hi", "logit_bias": None})
    assert [request.params.logit_bias for request in loop.requests] == [((7, -100.0), (9, 2.5)), ()]


def test_a_bias_for_a_token_that_the_model_has_not_is_refused(client: TestClient, frozen: FrozenModel) -> None:
    found = error(client, prompt="hi", logit_bias={"3": 1, str(frozen.vocabulary_size): 1})
    assert found["param"] == "logit_bias"
    last = frozen.vocabulary_size - 1
    had = f"for the vocabulary has {frozen.vocabulary_size} tokens; got {frozen.vocabulary_size}"
    assert found["message"] == f"logit_bias: token ids must be from 0 to {last}, {had}"
    found = error(client, prompt="hi", stop_token_ids=[3, frozen.vocabulary_size])
    assert found["message"] == f"stop_token_ids: token ids must be from 0 to {last}, {had}"


def test_a_streamed_echo_comes_with_its_own_logprobs(client: TestClient, loop: FakeLoop) -> None:
    first, *rest = events(client, prompt="hi", echo=True, logprobs=0, max_tokens=3)
    ids = [*loop.requests[0].prompt_ids, *loop.answer(loop.requests[0])[:1]]
    assert first["text"].startswith("hi")
    assert first["logprobs"]["token_ids"] == ids
    assert "".join(piece["text"] for piece in (first, *rest)) == "hi" + ANSWER[:2]


def test_nothing_may_be_said_only_where_a_prompt_is_echoed(client: TestClient) -> None:
    found = error(client, prompt="hi", max_tokens=0)
    assert found["message"].startswith("max_tokens must be from 1 to 1000000, got 0; 0 is for routes that echo")
    assert client.post("/generate", json={"prompt": "hi", "max_tokens": 0, "echo": True}).json()["text"] == "hi"


def test_stop_strings_are_not_looked_for_within_min_tokens(client: TestClient) -> None:
    before = len("Hällo wör".encode())
    for min_tokens, text in ((before - 1, "Hällo "), (before, ANSWER)):
        body = {"prompt": "hi", "stop": "wör", "min_tokens": min_tokens}
        assert client.post("/generate", json=body).json()["text"] == text
        assert "".join(event["text"] for event in events(client, **body)) == text


@pytest.mark.parametrize(
    ("field", "near"),
    [("prefix", "prefix_id"), ("prefixid", "prefix_id"), ("max_token", "max_tokens"), ("topp", "top_p")],
)
def test_a_misspelt_field_is_refused_with_the_nearest(client: TestClient, field: str, near: str) -> None:
    found = error(client, prompt="hi", **{field: "x"})
    assert found["message"] == f"unknown field {field!r}; did you mean {near!r}?"
    assert found["param"] == field


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": "x", "prefix_id": ""}, "prefix_id"),
        ({"prompt": "x", "prefix_id": "No such name"}, "prefix_id"),
        ({"prompt": "x", "prefix_id": "a@0"}, "prefix_id"),
        ({"prompt": "x", "max_tokens": "5"}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "stop_token_ids": [-1]}, "stop_token_ids"),
        ({"prompt": "x", "stop_token_ids": [5, 10**9]}, "stop_token_ids"),
        ({"prompt": "x", "max_tokens": 10**400}, "max_tokens"),
        ({"prompt": "x", "temperature": -1}, "temperature"),
        ({"prompt": "x", "temperature": "1"}, "temperature"),
        ({"prompt": "x", "top_p": 0}, "top_p"),
        ({"prompt": "x", "stream": 1}, "stream"),
        ({"prompt": "x", "n": 0}, "n"),
        ({"prompt": "x", "stop": ""}, "stop"),
        ({"prompt": "x", "stop": [3]}, "stop"),
        ({"prompt": "x", "logprobs": 1000}, "logprobs"),
        ({"prompt": "x", "timeout_s": 0}, "timeout_s"),
        ({"prompt": "x", "repetition_penalty": 0}, "repetition_penalty"),
        ({"prompt": "x", "repetition_penalty": "1"}, "repetition_penalty"),
        ({"prompt": "x", "presence_penalty": 3}, "presence_penalty"),
        ({"prompt": "x", "frequency_penalty": -2.5}, "frequency_penalty"),
        ({"prompt": "x", "logit_bias": [1]}, "logit_bias"),
        ({"prompt": "x", "logit_bias": {"x": 1}}, "logit_bias"),
        ({"prompt": "x", "logit_bias": {"5": "1"}}, "logit_bias"),
        ({"prompt": "x", "logit_bias": {"5": None}}, "logit_bias"),
        ({"prompt": "x", "logit_bias": {"5": 101}}, "logit_bias"),
        ({"prompt": "x", "min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"prompt": "x", "min_tokens": -1}, "min_tokens"),
        ({"prompt": "x", "min_tokens": 1.5}, "min_tokens"),
    ],
)
def test_a_bad_field_is_400_and_named(client: TestClient, body: dict[str, Any], param: str) -> None:
    assert error(client, **body)["param"] == param


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b'"x"', b"\xff", b'{"prompt": "\\ud800"}', b'{"prompt":"x","temperature":NaN}', b"[" * 100_000],
)
def test_a_body_that_is_no_json_object_is_400(client: TestClient, raw: bytes) -> None:
    reply = client.post("/generate", content=raw, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "invalid_request"


def test_another_content_type_is_400_and_says_which_is_meant(client: TestClient) -> None:
    for headers in ({}, {"content-type": "text/plain"}, {"content-type": "application/jsonx"}):
        reply = client.post("/generate", content=b'{"prompt": "x"}', headers=headers)
        assert reply.status_code == 400
        assert "application/json" in reply.json()["error"]["message"]
    utf8 = {"content-type": "Application/JSON; charset=utf-8"}
    assert client.post("/generate", content=b'{"prompt": "x"}', headers=utf8).status_code == 200


def test_an_unknown_prefix_is_404_and_never_the_bare_model(client: TestClient, loop: FakeLoop, prefix: str) -> None:
    bodies = []
    for reference in ("nope", "support@2", "support@live", "other/nope", "other/support", "tiny-llama"):
        reply = client.post("/generate", json={"prompt": "x", "prefix_id": reference})
        assert reply.status_code == 404
        bodies.append(reply.text.replace(reference, "…"))
    assert len(set(bodies)) == 1
    assert json.loads(bodies[0])["error"]["code"] == "prefix_not_found"
    assert not loop.requests


def test_an_exact_version_can_be_asked_for(client: TestClient, store: Store, frozen: FrozenModel) -> None:
    publish(store, frozen)
    publish(store, frozen, template="{prompt}!")
    versions = [
        client.post("/generate", json={"prompt": "x", "prefix_id": name}).json()["prefix"]["version"]
        for name in ("support", "support@1", "default/support@2")
    ]
    assert versions == [2, 1, 2]


def test_a_memory_counts_no_virtual_tokens(client: TestClient, frozen: FrozenModel, loop: FakeLoop) -> None:
    reply = client.post("/v1/prefixes", data={"id": "plus"}, files={"file": ("x", artefacts.memory(frozen))})
    assert reply.status_code == 201
    assert (reply.json()["method"], reply.json()["virtual_tokens"]) == ("prefix_plus", 0)
    reply = client.post("/generate", json={"prompt": "x", "prefix_id": "plus"})
    assert reply.json()["usage"]["virtual_tokens"] == 0
    assert reply.json()["prefix"]["id"] == "plus"
    prefix = loop.requests[-1].prefix
    assert (prefix.feature_map, prefix.slots, prefix.position_offset) == ("elu", memory_slots(frozen.geometry), 0)


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"host": "evil.example"},
        {"host": "10.0.0.1:8000"},
    ],
)
def test_an_open_server_does_not_answer_web_pages_from_elsewhere(client: TestClient, headers: dict[str, str]) -> None:
    assert client.get("/v1/prefixes", headers=headers).status_code == 403
    assert client.get("/v1/prefixes", headers={"origin": "http://127.0.0.1:8000"}).status_code == 200


def test_a_server_can_refuse_to_serve_the_bare_model(serve: Serve, prefix: str) -> None:
    client = serve(require_prefix=True)
    assert error(client, prompt="x")["param"] == "prefix_id"
    assert client.post("/generate", json={"prompt": "x", "prefix_id": prefix}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_429_with_retry_after(client: TestClient, loop: FakeLoop, stream: bool) -> None:
    loop.refusal = Overloaded("full")
    loop.refusal.retry_after = 7
    reply = client.post("/generate", json={"prompt": "x", "stream": stream})
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "7")


def test_when_one_of_several_choices_is_refused_the_others_are_ended(client: TestClient, loop: FakeLoop) -> None:
    submit, loop.hold = loop.submit, threading.Event()

    def second_is_refused(request: Any, on_event: Any) -> None:
        if loop.requests:
            raise Overloaded("full")
        submit(request, on_event)

    loop.submit = second_is_refused
    assert client.post("/generate", json={"prompt": "x", "n": 3}).status_code == 429
    assert loop.requests[0].id in loop.aborted


def test_logits_that_overflow_have_a_code_of_their_own(client: TestClient, loop: FakeLoop) -> None:
    loop.failure = PrefixNumerics()
    reply = client.post("/generate", json={"prompt": "x"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (422, "prefix_numerics")
    assert events(client, prompt="x")[-1] == reply.json()


def test_a_server_without_memory_for_a_request_says_that_it_may_be_asked_again(
    client: TestClient, loop: FakeLoop
) -> None:
    loop.failure = OutOfMemory()
    reply = client.post("/generate", json={"prompt": "x"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "out_of_memory")
    assert int(reply.headers["retry-after"]) >= 1
    assert events(client, prompt="x")[-1] == reply.json()


def test_a_failure_in_the_engine_is_500_or_an_event(client: TestClient, loop: FakeLoop) -> None:
    loop.failure = GenerationFailed("the step broke")
    reply = client.post("/generate", json={"prompt": "x"})
    assert reply.status_code == 500
    assert reply.json()["error"]["code"] == "generation_failed"
    *pieces, last = events(client, prompt="x")
    assert "".join(piece["text"] for piece in pieces) == ANSWER
    assert last == reply.json()


def test_a_finished_call_is_counted(client: TestClient) -> None:
    client.post("/generate", json={"prompt": "x", "n": 2})
    client.post("/generate", json={"prompt": "x", "max_tokens": 1})
    text = client.get("/metrics").text
    assert 'antefix_request_success_total{finished_reason="stop"} 2.0' in text
    assert 'antefix_request_success_total{finished_reason="length"} 1.0' in text
    assert "antefix_time_to_first_token_seconds_count 2.0" in text
    assert "antefix_request_prompt_tokens_count 2.0" in text
    assert "antefix_request_time_per_output_token_seconds_count 1.0" in text, "one token alone has no pace"


def test_tokens_are_counted_by_tenant(client: TestClient) -> None:
    usages = [client.post("/generate", json={"prompt": prompt}).json()["usage"] for prompt in ("x", "the king")]
    text = client.get("/metrics").text
    for kind, field in (("prompt", "prompt_tokens"), ("generation", "completion_tokens")):
        counted = float(sum(usage[field] for usage in usages))
        assert f'antefix_tenant_tokens_total{{kind="{kind}",tenant="default"}} {counted}' in text
    client.post("/generate", json={"prompt": "x", "max_tokens": 0})
    assert client.get("/metrics").text.count("antefix_tenant_tokens_total{") == 4, "who is refused is not counted"


def test_a_field_given_twice_is_refused(client: TestClient) -> None:
    body = '{"prompt": "x", "prefix_id": "carroll", "prefix_id": null}'
    reply = client.post("/generate", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "prefix_id"


@pytest.mark.parametrize("body", ['{"prompt": "a", "stop": [%s]}', '{"prompt": [%s]}'])
def test_a_million_wrong_items_do_not_keep_others_waiting(client: TestClient, body: str) -> None:
    content = body % ",".join(["1.5"] * 900_000)
    begun = time.monotonic()
    reply = client.post("/generate", content=content, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert time.monotonic() - begun < 5  # 16 s when each item gets an error of its own


def test_a_bias_for_ever_so_many_tokens_does_not_keep_others_waiting(client: TestClient) -> None:
    begun = time.monotonic()
    found = error(client, prompt="x", logit_bias={str(token): "x" for token in range(250_000)})
    assert found["message"] == "logit_bias must be at most 1024 token ids, got 250000"
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("path", ["/generate%0a", "/generate/", "/v1/prefixes/carroll%0a"])
def test_almost_a_route_is_no_route(client: TestClient, path: str) -> None:
    for reply in (client.post(path, json={"prompt": "x"}), client.delete(path)):
        assert reply.status_code in (404, 405)
        assert reply.json()["error"]["type"] == "invalid_request_error"


def test_more_answers_than_may_ever_wait_are_no_overload(client: TestClient, loop: FakeLoop) -> None:
    loop.most_waiting = 3
    refused = error(client, prompt="hi", n=4)
    assert (refused["param"], refused["code"]) == ("n", "invalid_request")
    assert "4 answers" in refused["message"]
    assert client.post("/generate", json={"prompt": "hi", "n": 3}).status_code == 200
