from typing import Any

import pytest
from starlette.testclient import TestClient

from prefix_store.model.frozen import FrozenModel
from prefix_store.store import Store
from server.api import tokens
from tests.server.api.test_completions import refused
from tests.server.api.test_generate import publish
from tests.server.conftest import Serve

TEMPLATE = "<s>{% for message in messages %}{{ message.content }}|{% endfor %}"


def post(client: TestClient, path: str, **body: Any) -> dict[str, Any]:
    reply = client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def test_a_text_and_its_ids(client: TestClient, frozen: FrozenModel) -> None:
    text = "né </s>"
    bare = post(client, "/tokenize", prompt=text, add_special_tokens=False)
    assert bare["tokens"] == frozen.tokenizer(text, add_special_tokens=False).input_ids
    assert (bare["count"], bare["max_model_len"], bare["token_strs"]) == (len(bare["tokens"]), 512, None)
    whole = post(client, "/tokenize", prompt=text, return_token_strs=True, model="tiny-llama")
    assert whole["tokens"] == [frozen.tokenizer.bos_token_id, *bare["tokens"]]
    assert (whole["token_strs"][0], len(whole["token_strs"])) == ("<s>", whole["count"])
    assert post(client, "/detokenize", tokens=bare["tokens"]) == {"prompt": text}
    assert post(client, "/detokenize", tokens=[]) == {"prompt": ""}


def test_a_prefixs_template_is_no_part_of_a_text(client: TestClient, store: Store, frozen: FrozenModel) -> None:
    publish(store, frozen, template="Q: {prompt} A:")
    assert post(client, "/tokenize", prompt="x", model="support") == post(client, "/tokenize", prompt="x")


def test_messages_are_tokenized_in_the_chat_template(serve: Serve, frozen: FrozenModel) -> None:
    client = serve(chat_template=TEMPLATE)
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    found = post(client, "/tokenize", messages=messages)["tokens"]
    assert found == frozen.tokenizer("<s>a|b|", add_special_tokens=False).input_ids


def test_an_example_is_tokenized_as_training_reads_it(serve: Serve, store: Store, frozen: FrozenModel) -> None:
    client = serve(chat_template=TEMPLATE)
    publish(store, frozen, template="Q: {prompt} A:")
    pair = {"prompt": "ab", "completion": "cd"}
    for model, prompt in ((None, "ab"), ("tiny-llama", "ab"), ("support", "Q: ab A:")):
        (piece,) = post(client, "/tokenize", example=pair, model=model)["examples"]
        before = frozen.tokenizer(prompt).input_ids
        assert piece["tokens"] == [*before, *frozen.tokenizer("cd").input_ids[1:], 1]
        assert piece["targets"] == [len(before) + place for place in range(3)]
    user, assistant = {"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}
    (piece,) = post(client, "/tokenize", example={"messages": [user, assistant, user, assistant]})["examples"]
    assert piece["tokens"] == frozen.tokenizer("<s>ab|cd|ab|cd|</s>", add_special_tokens=False).input_ids
    assert piece["targets"] == [4, 5, 6, 10, 11, 12, 13]
    pieces = post(client, "/tokenize", example={"text": "abcdef"}, max_length=4)["examples"]
    assert [len(piece["tokens"]) for piece in pieces] == [4, 4, 2]
    long = {"prompt": "x" * 1000, "completion": "y"}
    (piece,) = post(client, "/tokenize", example=long, model="support", max_length=5000)["examples"]
    assert len(piece["tokens"]) == 512 - 4  # the prefix's place


def test_what_the_tokenizer_is(client: TestClient, serve: Serve) -> None:
    found = client.get("/tokenizer_info").json()
    assert (found["bos_token"], found["eos_token"], found["pad_token"]) == ("<s>", "</s>", None)
    assert (found["vocab_size"], found["model_max_length"], found["chat_template"]) == (258, 512, None)
    eos = post(client, "/tokenize", prompt=found["eos_token"], add_special_tokens=False)
    assert eos["tokens"] == [1]
    assert serve(chat_template=TEMPLATE).get("/tokenizer_info").json()["chat_template"] == TEMPLATE


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"prompt": "x", "example": {"text": "a"}}, "prompt"),
        ("/tokenize", {"example": {"text": ""}}, "example"),
        ("/tokenize", {"example": {"text": "x" * (tokens.LONGEST_TEXT + 1)}}, "example"),
        ("/tokenize", {"example": {"text": "a"}, "max_length": 1}, "max_length"),
        ("/tokenize", {"example": {"messages": [{"role": "user", "content": "x"}]}}, "example"),
        ("/tokenize", {"prompt": "x" * (tokens.LONGEST_TEXT + 1)}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": "x"}]}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [5, 258]}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
    ],
)
def test_a_bad_field_is_400_and_named(client: TestClient, path: str, body: dict[str, Any], param: str) -> None:
    assert refused(client, path=path, **body)["param"] == param


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [5]})])
def test_an_unknown_model_is_404_here_too(client: TestClient, path: str, body: dict[str, Any]) -> None:
    assert refused(client, 404, path, **body, model="gpt-4o")["code"] == "model_not_found"
