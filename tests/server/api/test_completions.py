import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from prefix_store.errors import GenerationFailed, Overloaded
from prefix_store.model.frozen import FrozenModel
from prefix_store.model.prompt import encode
from prefix_store.store import Store
from server.api.completions import DEFAULT_MAX_TOKENS, MOST_CHOICES
from tests.server.api.test_generate import publish
from tests.server.conftest import ANSWER, Serve
from tests.server.fakes import END, FakeLoop

BASE = {"model": "tiny-llama", "prompt": "hi"}
LONG = {**BASE, "max_tokens": 64}


@pytest.fixture
def prefix(store: Store, frozen: FrozenModel) -> str:
    publish(store, frozen)
    return "support"


def complete(client: TestClient, **body: Any) -> dict[str, Any]:
    reply = client.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def chunks(client: TestClient, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
    reply = client.post(path, json={"stream": True, **body})
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert "\r" not in reply.text
    *blocks, end = reply.text.split("\n\n")
    assert (blocks.pop(), end) == ("data: [DONE]", "")
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def refused(client: TestClient, status: int = 400, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    reply = client.post(path, json=body)
    assert reply.status_code == status, reply.text
    found: dict[str, Any] = reply.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


def test_the_whole_reply(client: TestClient, prefix: str, loop: FakeLoop) -> None:
    reply = complete(client, model=prefix, prompt="hi", max_tokens=64)
    assert reply["id"].startswith("cmpl-")
    assert (reply["object"], reply["model"]) == ("text_completion", "support")
    assert reply["choices"] == [{"index": 0, "text": ANSWER, "logprobs": None, "finish_reason": "stop"}]
    used = {"prompt_tokens": 3, "completion_tokens": len(ANSWER.encode()), "virtual_tokens": 4}
    assert reply["usage"] == {**used, "total_tokens": 3 + len(ANSWER.encode())}
    assert (reply["prefix"]["id"], reply["prefix"]["version"], len(reply["prefix"]["digest"])) == ("support", 1, 64)
    assert reply["system_fingerprint"].startswith("fp_")
    assert isinstance(reply["created"], int)
    assert loop.requests[0].prefix.digest == reply["prefix"]["digest"]


def test_max_tokens_is_openais_default_or_what_room_there_is(
    client: TestClient, prefix: str, frozen: FrozenModel, loop: FakeLoop
) -> None:
    complete(client, **BASE)
    complete(client, model=prefix, prompt=[5] * (frozen.context_length - 10))
    complete(client, **BASE, max_tokens=3, max_completion_tokens=5)
    assert [request.params.max_tokens for request in loop.requests] == [DEFAULT_MAX_TOKENS, 6, 5]


def test_sampling_fields_reach_the_engine_and_unknown_ones_are_passed_over(client: TestClient, loop: FakeLoop) -> None:
    asked = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 3, "ignore_eos": True, "logprobs": 0}
    asked |= {"repetition_penalty": 1.2, "presence_penalty": -0.5, "frequency_penalty": 0.5, "min_tokens": 2}
    passed_over = {"topp": 3, "stop": None, "logit_bias": None, "user": "u", "best_of": 1}
    passed_over |= {"suffix": "", "stream_options": {"include_obfuscation": True}}
    complete(client, **BASE, **asked, **passed_over)
    (request,) = loop.requests
    assert {name: getattr(request.params, name) for name in asked} == asked
    assert request.prefix is None  # `prefix_id` is no field of this route: only `model` names a prefix


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 0])
def test_a_temperature_next_to_nothing_is_greedy(client: TestClient, loop: FakeLoop, temperature: float) -> None:
    complete(client, **BASE, temperature=temperature)
    assert loop.requests[0].params.is_greedy


@pytest.mark.parametrize(
    ("prompt", "sent"),
    [
        ("hi", [[0, 73, 74]]),
        (["hi", "h"], [[0, 73, 74], [0, 73]]),
        ([5, 6], [[5, 6]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
        ("", [[0]]),
        ([], [[0]]),
        ([[]], [[0]]),
        ([""], [[0]]),
    ],
)
def test_a_prompt_is_text_or_ids_one_or_several(
    client: TestClient, frozen: FrozenModel, loop: FakeLoop, prompt: Any, sent: list[list[int]]
) -> None:
    text = encode(frozen.tokenizer, "hi")
    sent = [[{73: text[1], 74: text[2]}.get(token, token) for token in ids] for ids in sent]
    reply = complete(client, model="tiny-llama", prompt=prompt, n=2)
    assert [list(request.prompt_ids) for request in loop.requests] == [ids for ids in sent for _ in range(2)]
    assert [choice["index"] for choice in reply["choices"]] == list(range(2 * len(sent)))
    assert reply["usage"]["prompt_tokens"] == sum(len(ids) for ids in sent)


def test_the_choices_of_each_prompt_draw_as_they_would_alone(client: TestClient, loop: FakeLoop) -> None:
    complete(client, model="tiny-llama", prompt=["a", "b"], n=2, seed=9)
    assert [request.params.seed for request in loop.requests] == [9, 10, 9, 10]
    assert len({request.id for request in loop.requests}) == 4


def test_the_template_of_a_prefix_goes_around_texts_alone(
    client: TestClient, store: Store, frozen: FrozenModel, loop: FakeLoop
) -> None:
    publish(store, frozen, template="Q: {prompt} A:")
    complete(client, model="support", prompt=["hi", "you"])
    complete(client, model="support", prompt=[5, 6])
    complete(client, **BASE)
    read = [frozen.tokenizer.decode(request.prompt_ids, skip_special_tokens=True) for request in loop.requests]
    assert read[:2] + read[3:] == ["Q: hi A:", "Q: you A:", "hi"]
    assert loop.requests[2].prompt_ids == (5, 6)


def test_a_streams_chunks_are_openais(client: TestClient, prefix: str) -> None:
    whole = complete(client, model=prefix, prompt="hi", max_tokens=64)
    streamed = chunks(client, model=prefix, prompt="hi", max_tokens=64)
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == ANSWER
    assert [chunk["choices"][0]["finish_reason"] for chunk in streamed] == [None] * (len(streamed) - 1) + ["stop"]
    same = ("object", "model", "system_fingerprint", "prefix")
    for chunk in streamed:
        assert set(chunk) == {"id", "object", "created", "model", "choices", "system_fingerprint", "prefix"}
        assert [chunk[name] for name in same] == [whole[name] for name in same]
        assert set(chunk["choices"][0]) == {"index", "text", "logprobs", "finish_reason"}
    assert len({chunk["id"] for chunk in streamed}) == 1


def test_usage_is_streamed_only_if_asked_for(client: TestClient, prefix: str) -> None:
    asked = {"model": prefix, "prompt": "hi", "max_tokens": 3}
    used = {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6, "virtual_tokens": 4}
    assert all("usage" not in chunk for chunk in chunks(client, **asked, stream_options={"include_usage": False}))
    *pieces, last = chunks(client, **asked, stream_options={"include_usage": True})
    assert [chunk["usage"] for chunk in pieces] == [None] * len(pieces)
    assert (last["choices"], last["usage"]) == ([], used)
    options = {"include_usage": True, "continuous_usage_stats": True}
    *pieces, last = chunks(client, **asked, stream_options=options)
    counted = [chunk["usage"]["completion_tokens"] for chunk in pieces]
    assert counted == sorted(counted)
    assert (pieces[-1]["usage"], last["usage"], last["choices"]) == (used, used, [])


def test_logprobs_say_where_in_the_text_each_token_begins(client: TestClient) -> None:
    asked = {"model": "tiny-llama", "prompt": "hé", "logprobs": 2, "max_tokens": 5}
    (choice,) = complete(client, **asked)["choices"]
    assert choice["text"] == "Häll"
    assert choice["logprobs"]["tokens"][0] == "H"
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 2, 3]  # ä is two tokens
    assert choice["logprobs"]["top_logprobs"][0] == {"H": -0.5, "I": -1.5}
    (echoed,) = complete(client, **asked, echo=True)["choices"]
    assert echoed["text"] == "héHäll"
    # BOS has no text, é is two tokens
    assert echoed["logprobs"]["text_offset"] == [0, 0, 1, 1, 2, 3, 3, 4, 5]
    assert echoed["logprobs"]["token_logprobs"][0] is None
    for echo in (False, True):
        whole = complete(client, **asked, echo=echo)["choices"][0]
        streamed = [chunk["choices"][0] for chunk in chunks(client, **asked, echo=echo)]
        assert "".join(piece["text"] for piece in streamed) == whole["text"]
        parts = [piece["logprobs"] for piece in streamed if piece["logprobs"]]
        assert {key: [entry for part in parts for entry in part[key]] for key in parts[0]} == whole["logprobs"]


def test_a_streamed_echo_comes_with_its_own_logprobs(client: TestClient, loop: FakeLoop) -> None:
    asked = {"model": "tiny-llama", "prompt": ["hé", "you"], "logprobs": 0, "n": 2, "echo": True}
    for max_tokens in (0, 3):
        streamed = [chunk["choices"][0] for chunk in chunks(client, **asked, max_tokens=max_tokens)]
        for index, prompt in enumerate(("hé", "hé", "you", "you")):
            first = next(piece for piece in streamed if piece["index"] == index)
            ids = loop.requests[index].prompt_ids
            assert first["text"].startswith(prompt)
            assert tuple(first["logprobs"]["token_ids"][: len(ids)]) == ids
            assert len(first["logprobs"]["tokens"]) == len(ids) + (max_tokens > 0)


@pytest.mark.parametrize("stream", [False, True])
def test_after_an_echo_the_token_that_ends_the_text_is_scored_too(
    client: TestClient, loop: FakeLoop, stream: bool
) -> None:
    """Clients that score a prompt take the last entry off, and must not take off one of the prompt's."""
    loop.answer = lambda request: []
    for echo, scored in ((True, [5, 6, END]), (False, [])):
        asked = {"model": "tiny-llama", "prompt": [5, 6], "logprobs": 1, "max_tokens": 1, "echo": echo}
        replies = chunks(client, **asked) if stream else [complete(client, **asked)]
        parts = [reply["choices"][0]["logprobs"] or {"token_ids": []} for reply in replies]
        assert [token for part in parts for token in part["token_ids"]] == scored
        assert replies[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "model", ["gpt-4o", "support@2", "other/support", "Support", "meta-llama/Llama-3", "a:b", "tiny-llama@1", " "]
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_an_unknown_model_is_404_and_never_the_base(
    client: TestClient, prefix: str, loop: FakeLoop, model: str, path: str
) -> None:
    found = refused(client, 404, path, model=model, prompt="x", messages=[{"role": "user", "content": "x"}])
    assert (found["code"], found["param"]) == ("model_not_found", "model")
    assert found["message"] == f"The model `{model}` does not exist or you do not have access to it."
    assert not loop.requests


def test_a_server_can_refuse_to_serve_the_bare_model_here_too(serve: Serve, prefix: str, loop: FakeLoop) -> None:
    client = serve(require_prefix=True, chat_template="{{ messages[0].content }}")
    for path in ("/v1/completions", "/v1/chat/completions"):
        body = {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}
        assert refused(client, path=path, model="tiny-llama", **body)["param"] == "model"
        assert not loop.requests
        assert client.post(path, json={"model": prefix, **body}).status_code == 200
        assert loop.requests.pop().prefix is not None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "x"}, "model"),
        ({"prompt": "x", "model": None}, "model"),
        ({"prompt": "x", "model": ""}, "model"),
        ({"prompt": "x", "model": 3}, "model"),
        ({"model": "tiny-llama"}, "prompt"),
        ({**BASE, "prompt": 3}, "prompt"),
        ({**BASE, "prompt": ["x", 3]}, "prompt"),
        ({**BASE, "prompt": [[5], "x"]}, "prompt"),
        ({**BASE, "prompt": [[5], [10**6]]}, "prompt"),
        ({**BASE, "prompt": ["x"] * (MOST_CHOICES // 2 + 1), "n": 2}, "prompt"),
        ({**BASE, "max_tokens": 0}, "max_tokens"),
        ({**BASE, "temperature": "1"}, "temperature"),
        ({**BASE, "n": 2, "best_of": 3}, "best_of"),
        ({**BASE, "suffix": "end"}, "suffix"),
        ({**BASE, "use_beam_search": True}, "use_beam_search"),
        ({**BASE, "stream_options": 3}, "stream_options"),
        ({**BASE, "logprobs": 21}, "logprobs"),
    ],
)
def test_a_bad_field_is_400_and_named(client: TestClient, body: dict[str, Any], param: str) -> None:
    assert refused(client, **body)["param"] == param


def test_the_context_counts_the_prefix(client: TestClient, prefix: str, frozen: FrozenModel) -> None:
    found = refused(client, model=prefix, prompt=[5] * (frozen.context_length + 1))
    assert found["code"] == "context_length_exceeded"
    assert found["message"].startswith("This model's maximum context length is 512 tokens")


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_429(client: TestClient, loop: FakeLoop, stream: bool) -> None:
    loop.refusal = Overloaded("full")
    reply = client.post("/v1/completions", json={**BASE, "stream": stream})
    assert (reply.status_code, reply.json()["error"]["type"]) == (429, "rate_limit_error")


def test_a_failure_in_mid_stream_is_an_event(client: TestClient, loop: FakeLoop) -> None:
    loop.failure = GenerationFailed("the step broke")
    *pieces, last = chunks(client, **LONG, stream_options={"include_usage": True})
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == ANSWER
    assert set(last) == {"error"}
    assert (last["error"]["code"], last["error"]["message"]) == ("generation_failed", "the step broke")


def test_a_body_that_is_too_large_is_413(client: TestClient) -> None:
    reply = client.post("/v1/completions", json={**BASE, "prompt": "x" * (5 << 20)})
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "payload_too_large")


def test_a_finished_call_is_counted(client: TestClient) -> None:
    complete(client, **LONG, n=2)
    assert 'antefix_request_success_total{finished_reason="stop"} 2.0' in client.get("/metrics").text


@pytest.mark.parametrize("model", ["tiny-llama", "support"])
def test_a_prefix_named_as_in_generate_is_refused_and_not_passed_over(
    client: TestClient, prefix: str, model: str
) -> None:
    reply = client.post("/v1/completions", json={**BASE, "model": model, "prefix_id": prefix})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "prefix_id")


@pytest.mark.parametrize(("given", "said"), [(0, "must be from 1"), (-1, "must be from 0"), (10**7, "got 10000000")])
def test_an_error_names_the_field_as_it_was_written(client: TestClient, given: int, said: str) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        body = {"model": "tiny-llama", "prompt": "x", name: given}
        error = client.post("/v1/completions", json=body).json()["error"]
        assert (error["param"], said in error["message"]) == (name, True)
        assert error["message"].startswith(f"{name} must be")


def test_minus_one_is_no_top_k(client: TestClient, loop: FakeLoop) -> None:
    assert client.post("/v1/completions", json={"model": "tiny-llama", "prompt": "x", "top_k": -1}).status_code == 200
    assert loop.requests[0].params.top_k == 0
    error = client.post("/v1/completions", json={"model": "tiny-llama", "prompt": "x", "top_k": -2}).json()["error"]
    assert error["param"] == "top_k"
