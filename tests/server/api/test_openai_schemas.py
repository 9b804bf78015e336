import json
import time
from typing import Any

import pytest
from starlette.testclient import TestClient

from prefix_store.errors import InvalidRequest
from server.api.openai_schemas import ChatBody, CompletionBody, LenientBody, TokenizeBody


def read(**fields: Any) -> CompletionBody:
    return CompletionBody.model_validate_json(json.dumps({"model": "m", "prompt": "x", **fields}))


@pytest.mark.parametrize(
    ("prompt", "several"),
    [("x", ["x"]), ([1, 2], [[1, 2]]), (["x", "y"], ["x", "y"]), ([[1], [2]], [[1], [2]]), ([], [[]]), ([[]], [[]])],
)
def test_prompts_come_one_by_one(prompt: Any, several: list[Any]) -> None:
    assert read(prompt=prompt).prompts == several


def test_null_is_absent_and_the_newer_name_counts() -> None:
    assert read(max_tokens=3, max_completion_tokens=None, stop=None, stream_options=None).max_tokens == 3
    assert read(max_tokens=3, max_completion_tokens=4).max_tokens == 4
    assert read(stream_options={"include_usage": None}).stream_options.include_usage is False


def test_the_fields_of_a_message_that_a_template_may_want() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "x", "name": "n"}, {"role": "user"}]}
    named, empty = ChatBody.model_validate_json(json.dumps(body)).messages
    assert named.to_json() == {"role": "user", "content": "x", "name": "n"}
    assert empty.to_json() == {"role": "user", "content": ""}


@pytest.mark.parametrize("prompt", ["[%s]", "[[%s]]", "[[1], [%s]]"])
def test_a_million_wrong_items_do_not_keep_others_waiting(client: TestClient, prompt: str) -> None:
    content = '{"model": "tiny-llama", "prompt": %s}' % (prompt % ",".join(["1.5"] * 900_000))
    begun = time.monotonic()
    reply = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert time.monotonic() - begun < 8


@pytest.mark.parametrize("kind", [ChatBody, TokenizeBody])
@pytest.mark.parametrize("field", [{"add_generation_prompt": False}, {"continue_final_message": True}])
def test_another_rendering_than_the_servers_is_refused(kind: type[LenientBody], field: dict[str, bool]) -> None:
    asked = {"model": "plays", "messages": [{"role": "user", "content": "hi"}]}
    kind.model_validate(asked | {name: not value for name, value in field.items()})
    with pytest.raises(InvalidRequest, match="is not supported"):
        kind.model_validate(asked | field)
