import json
import re
import time
from pathlib import Path
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


ANSWERING: dict[type[LenientBody], dict[str, Any]] = {
    CompletionBody: {"model": "m", "prompt": "x"},
    ChatBody: {"model": "m", "messages": [{"role": "user", "content": "x"}]},
}
# What would be another answer than was asked for, by the routes that refuse it; then what asks for nothing else.
REFUSED: list[tuple[set[type[LenientBody]], str, Any, list[Any]]] = [
    ({CompletionBody}, "suffix", "end", ["", None]),
    ({CompletionBody}, "best_of", 3, [1, None]),
    ({CompletionBody}, "add_special_tokens", False, [None]),
    ({CompletionBody}, "prompt_embeds", "AAAA", [None]),
    ({ChatBody}, "tools", [{"type": "function", "function": {"name": "f"}}], [[], None]),
    ({ChatBody}, "tool_choice", "required", ["none", "auto", None]),
    ({ChatBody}, "tool_choice", {"type": "function", "function": {"name": "f"}}, []),
    ({ChatBody}, "functions", [{"name": "f"}], [[], None]),
    ({ChatBody}, "function_call", {"name": "f"}, ["none", "auto", None]),
    ({ChatBody}, "modalities", ["text", "audio"], [["text"], None]),
    ({ChatBody}, "web_search_options", {}, [None]),
    ({ChatBody}, "echo", True, [False, None]),
    ({ChatBody}, "add_special_tokens", True, [None]),
    ({ChatBody}, "documents", [{"text": "x"}], [[], None]),
    ({ChatBody}, "chat_template", "{{ x }}", [None]),
    ({ChatBody}, "chat_template_kwargs", {"enable_thinking": False}, [{}, None]),
    *(
        ({CompletionBody, ChatBody}, name, value, harmless)
        for name, value, harmless in [
            ("allowed_token_ids", [5], [[], None]),
            ("bad_words", ["x"], [[], None]),
            ("guided_whitespace_pattern", " ", [None]),
            ("include_stop_str_in_output", True, [False, None]),
            ("logits_processors", ["x"], [[], None]),
            ("prompt_logprobs", 0, [None]),
            ("return_token_ids", True, [False, None]),
            ("return_tokens_as_token_ids", True, [False, None]),
            ("skip_special_tokens", False, [True, None]),
            ("truncate_prompt_tokens", 8, [None]),
            ("use_beam_search", True, [False, None]),
        ]
    ),
]
# What changes no answer here, or what a route of OpenAI's has no such field for.
PASSED_OVER = [
    *("metadata", "store", "service_tier", "prompt_cache_key", "safety_identifier", "prediction", "reasoning_effort"),
    *("verbosity", "parallel_tool_calls", "audio", "priority", "request_id", "cache_salt", "kv_transfer_params"),
    *(
        "spaces_between_special_tokens",
        "guided_decoding_backend",
        "mm_processor_kwargs",
        "vllm_xargs",
    ),
]


@pytest.mark.parametrize("kind", ANSWERING)
@pytest.mark.parametrize(("kinds", "field", "value", "harmless"), REFUSED)
def test_what_cannot_be_honoured_is_refused_where_it_would_change_the_answer(
    kind: type[LenientBody], kinds: set[type[LenientBody]], field: str, value: Any, harmless: list[Any]
) -> None:
    if kind in kinds:
        with pytest.raises(InvalidRequest, match=f"^{field} .*is not supported by this server") as error:
            kind.model_validate({**ANSWERING[kind], field: value})
        assert error.value.param == field
    for one in harmless:
        kind.model_validate({**ANSWERING[kind], field: one})


@pytest.mark.parametrize("kind", ANSWERING)
def test_what_changes_no_answer_is_passed_over(kind: type[LenientBody]) -> None:
    asked = kind.model_validate({**ANSWERING[kind], **{name: {"a": [1]} for name in PASSED_OVER}})
    assert asked == kind.model_validate(ANSWERING[kind])


def test_completions_have_no_tools(client: TestClient) -> None:
    """OpenAI's have none, so there is nothing to honour."""
    body = {"model": "tiny-llama", "prompt": "hi", "tools": [{"type": "function"}], "tool_choice": "required"}
    assert client.post("/v1/completions", json=body).status_code == 200


def test_every_field_is_in_the_clients_table() -> None:
    page = (
        (Path(__file__).parents[3] / "docs/clients.md")
        .read_text()
        .partition("## Which fields")[2]
        .partition("\n## ")[0]
    )
    told = set(re.findall(r"`([a-z_]+)`", page))
    known = {name for kind in ANSWERING for name in (*kind.model_fields, *kind.HARMLESS)}
    assert known | set(PASSED_OVER) <= told, (known | set(PASSED_OVER)) - told
