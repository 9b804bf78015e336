from typing import Any

import pytest
from starlette.testclient import TestClient

from prefix_store.model.frozen import FrozenModel
from prefix_store.store import Store
from tests.server.api.test_completions import chunks, refused
from tests.server.api.test_generate import publish
from tests.server.conftest import ANSWER, Serve
from tests.server.fakes import FakeLoop

PATH = "/v1/chat/completions"
TEMPLATE = """<s>{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}
{%- endif %}{{ message.role }}: {{ message.content }}|{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
BODY = {"model": "tiny-llama", "messages": MESSAGES}
RENDERED = "system: be brief|user: hi|assistant:"


@pytest.fixture
def client(serve: Serve) -> TestClient:
    return serve(chat_template=TEMPLATE)


def answer(client: TestClient, **body: Any) -> dict[str, Any]:
    reply = client.post(PATH, json=body)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def test_the_whole_reply(client: TestClient, loop: FakeLoop, frozen: FrozenModel) -> None:
    reply = answer(client, **BODY)
    assert reply["id"].startswith("chatcmpl-")
    assert (reply["object"], reply["model"], reply["prefix"]) == ("chat.completion", "tiny-llama", None)
    message = {"role": "assistant", "content": ANSWER, "refusal": None}
    assert reply["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    ids = loop.requests[0].prompt_ids
    assert ids[0] == frozen.tokenizer.bos_token_id != ids[1]  # the template's own BOS, and no second one
    assert frozen.tokenizer.decode(ids, skip_special_tokens=True) == RENDERED
    assert reply["usage"]["prompt_tokens"] == len(ids) == 1 + len(RENDERED)


def test_an_answer_may_take_what_room_there_is(client: TestClient, loop: FakeLoop, frozen: FrozenModel) -> None:
    answer(client, **BODY)
    answer(client, **BODY, max_tokens=5)
    answer(client, **BODY, max_tokens=5, max_completion_tokens=6)
    assert [request.params.max_tokens for request in loop.requests] == [512 - 1 - len(RENDERED), 5, 6]


def test_messages_stand_in_the_chat_template_and_not_in_the_prefixs(
    client: TestClient, store: Store, frozen: FrozenModel, loop: FakeLoop
) -> None:
    publish(store, frozen, template="Q: {prompt} A:")
    reply = answer(client, model="support", messages=MESSAGES)
    assert (reply["prefix"]["id"], reply["usage"]["virtual_tokens"]) == ("support", 4)
    assert frozen.tokenizer.decode(loop.requests[0].prompt_ids, skip_special_tokens=True) == RENDERED


def test_content_may_be_parts_and_may_be_absent(client: TestClient, loop: FakeLoop, frozen: FrozenModel) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "cache_control": {}}]
    messages = [{"role": "user", "content": parts, "odd": 1}, {"role": "assistant", "content": None}]
    answer(client, model="tiny-llama", messages=messages)
    read = frozen.tokenizer.decode(loop.requests[0].prompt_ids, skip_special_tokens=True)
    assert read == "user: a\nb|assistant: |assistant:"


def test_a_model_without_a_template_says_so(serve: Serve, loop: FakeLoop) -> None:
    found = refused(serve(), path=PATH, **BODY)
    assert (found["code"], found["param"]) == ("chat_template_missing", "messages")
    assert "ANTEFIX_CHAT_TEMPLATE" in found["message"]
    assert not loop.requests


def test_what_a_template_refuses_is_400_with_its_reason(client: TestClient) -> None:
    found = refused(client, path=PATH, model="tiny-llama", messages=[{"role": "tool", "content": "x"}])
    assert (found["param"], found["message"]) == (
        "messages",
        "the chat template does not take these messages: no tools here",
    )


def test_a_streams_chunks_are_openais(client: TestClient) -> None:
    streamed = chunks(client, PATH, **BODY, n=2)
    for index in (0, 1):
        mine = [chunk["choices"][0] for chunk in streamed if chunk["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
        assert "".join(choice["delta"].get("content", "") for choice in mine) == ANSWER
        assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + ["stop"]
        assert all("role" not in choice["delta"] for choice in mine[1:])
        assert mine[-1]["delta"] == {}
    assert all(set(chunk["choices"][0]) == {"index", "delta", "logprobs", "finish_reason"} for chunk in streamed)
    assert {chunk["object"] for chunk in streamed} == {"chat.completion.chunk"}
    assert all("usage" not in chunk for chunk in streamed)
    assert chunks(client, PATH, **BODY, stream_options={"include_usage": True})[-1]["choices"] == []


def test_logprobs_are_one_entry_a_token(client: TestClient, loop: FakeLoop) -> None:
    whole = answer(client, **BODY, logprobs=True, top_logprobs=2, max_tokens=3)["choices"][0]["logprobs"]
    first, half, _ = whole["content"]
    assert (first["token"], first["logprob"], first["bytes"]) == ("H", -0.5, [72])
    assert [(top["token"], top["logprob"]) for top in first["top_logprobs"]] == [("H", -0.5), ("I", -1.5)]
    assert half["bytes"] is None
    assert half["token"].startswith("token_id:")
    streamed = chunks(client, PATH, **BODY, logprobs=True, top_logprobs=2, max_tokens=3)
    parts = [chunk["choices"][0]["logprobs"] for chunk in streamed if chunk["choices"][0]["logprobs"]]
    assert [entry for part in parts for entry in part["content"]] == whole["content"]
    bare = answer(client, **BODY, logprobs=True, max_tokens=1)["choices"][0]["logprobs"]
    assert bare["content"][0]["top_logprobs"] == []
    assert [request.params.logprobs for request in loop.requests] == [2, 2, 0]


def test_what_asks_for_no_other_kind_of_answer_is_passed_over(client: TestClient) -> None:
    answer(client, **BODY, tools=[], response_format={"type": "text"}, tool_choice="none", parallel_tool_calls=True)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": MESSAGES}, "model"),
        ({"model": "tiny-llama"}, "messages"),
        ({**BODY, "messages": []}, "messages"),
        ({**BODY, "messages": [{"content": "x"}]}, "messages"),
        ({**BODY, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({**BODY, "messages": ["x"]}, "messages"),
        ({**BODY, "logprobs": 3}, "logprobs"),
        ({**BODY, "top_logprobs": 2}, "top_logprobs"),
        ({**BODY, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({**BODY, "tools": [{"type": "function"}]}, "tools"),
        ({**BODY, "response_format": {"type": "xml"}}, "response_format.type"),
        ({**BODY, "max_completion_tokens": 0}, "max_completion_tokens"),
    ],
)
def test_a_bad_field_is_400_and_named(client: TestClient, body: dict[str, Any], param: str) -> None:
    assert refused(client, path=PATH, **body)["param"] == param


def test_messages_that_could_never_fit_are_refused_before_they_are_encoded(client: TestClient) -> None:
    found = refused(client, path=PATH, model="tiny-llama", messages=[{"role": "user", "content": "x" * (256 * 512)}])
    assert (found["code"], found["param"]) == ("context_length_exceeded", "messages")
    assert "This model's maximum context length is" in found["message"]
