import dataclasses
import json

import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient

from prefix_store.errors import InvalidRequest
from prefix_store.jobs import TrainingSpec
from server.api.schemas import GenerateBody, TrainBody
from server.scheduler.sampling_params import SamplingParams


def test_null_is_the_same_as_absent() -> None:
    nulls = {name: None for name in GenerateBody.model_fields if name != "prompt"}
    assert GenerateBody.model_validate({"prompt": "x", **nulls}) == GenerateBody.model_validate({"prompt": "x"})


@pytest.mark.parametrize("value", ["3", 3.0, True, [3]])
def test_nothing_is_turned_into_another_type(value: object) -> None:
    with pytest.raises(ValidationError):
        GenerateBody.model_validate({"prompt": "x", "max_tokens": value})


def test_a_whole_number_is_a_number() -> None:
    assert GenerateBody.model_validate({"prompt": "x", "temperature": 1}).temperature == 1.0


def test_a_very_long_unknown_name_is_cut() -> None:
    with pytest.raises(InvalidRequest) as caught:
        GenerateBody.model_validate({"prompt": "x", "y" * 100_000: 1})
    assert len(caught.value.message) < 200


def test_defaults_are_those_of_the_records() -> None:
    body, params = GenerateBody.model_validate({"prompt": "x"}), SamplingParams()
    shared = set(GenerateBody.model_fields) & {field.name for field in dataclasses.fields(SamplingParams)}
    for name in shared - {"max_tokens", "stop", "stop_token_ids", "logit_bias"}:
        assert getattr(body, name) == getattr(params, name)
    for name in ("stop", "stop_token_ids", "logit_bias"):
        assert not getattr(body, name)
        assert not getattr(params, name)


def test_every_sampling_parameter_can_be_given() -> None:
    assert {field.name for field in dataclasses.fields(SamplingParams)} <= set(GenerateBody.model_fields)


def test_token_ids_of_a_bias_may_be_texts_or_numbers() -> None:
    for biases in ({"5": 1, "0": -2.5}, {5: 1, 0: -2.5}):
        assert GenerateBody.model_validate({"prompt": "x", "logit_bias": biases}).logit_bias == {5: 1.0, 0: -2.5}


@pytest.mark.parametrize("key", ["", "x", "-1", "05", "5.0", " 5", "1_0", "٣", "9" * 11, "x" * 100_000])
def test_what_is_no_token_id_is_no_key_of_a_bias(key: str) -> None:
    with pytest.raises(InvalidRequest, match="logit_bias: keys must be token ids, got") as caught:
        GenerateBody.model_validate({"prompt": "x", "logit_bias": {key: 1}})
    assert len(caught.value.message) < 200
    assert TrainBody.model_validate({"examples": [{"prompt": "a", "completion": "b"}]}).options() == {}


def test_every_training_option_can_be_given() -> None:
    options = {field.name for field in dataclasses.fields(TrainingSpec)} - {"data_digest", "base_digest"}
    options -= {"chat_template", "unset"}
    assert set(TrainBody.model_fields) == options


@pytest.mark.parametrize("examples", [[], {}, "x", None, [1], [{"prompt": "x"}, []]])
def test_examples_are_a_list_of_objects(examples: object) -> None:
    with pytest.raises(
        ValidationError, match=r"expected a list of one or more|line \d: expected an object|Field required"
    ):
        TrainBody.model_validate({"examples": examples})
    with pytest.raises(ValidationError):
        TrainBody.model_validate_json(json.dumps({"examples": examples}))


@pytest.mark.parametrize("name", ["colour", "adapter", "x" * 100, "stopp_word_list", "Z"])
def test_a_name_that_is_far_from_all_gets_no_hint(client: TestClient, name: str) -> None:
    for path, body in (("/generate", {"prompt": "x"}), ("/v1/prefixes/a/train", {"examples": [{"text": "x"}]})):
        error = client.post(path, json={**body, name: 1}).json()["error"]
        assert error["message"] == f"unknown field {name[:80]!r}"
        assert error["param"] == name[:80]


@pytest.mark.parametrize(("name", "near"), [("limits", "limit"), ("afer", "after"), ("metod", "method")])
def test_a_parameter_that_is_near_to_one_is_hinted_at(client: TestClient, name: str, near: str) -> None:
    error = client.get("/v1/prefixes", params={name: 1}).json()["error"]
    assert error["message"] == f"unknown parameter {name!r}; did you mean {near!r}?"


def test_a_parameter_that_is_far_from_all_is_told_which_there_are(client: TestClient) -> None:
    error = client.get("/v1/jobs", params={"colour": 1}).json()["error"]
    assert error["message"] == "unknown parameter 'colour'; this route takes after, limit"
    error = client.get("/v1/prefixes/a", params={"colour": 1}).json()["error"]
    assert error["message"] == "unknown parameter 'colour'; this route takes none"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("max_tokens", "7secret", "max_tokens: Input should be a valid integer, got a text"),
        ("max_tokens", True, "max_tokens: Input should be a valid integer, got a truth value"),
        ("temperature", [1], "temperature: Input should be a valid number, got a list"),
        ("prompt", 3, "prompt: Input should be a valid string; or Input should be a valid array, got a number"),
        ("prompt", ["secret"], "prompt: Input should be a valid string; or Input should be a valid integer"),
    ],
)
def test_a_refusal_says_what_kind_of_thing_came(client: TestClient, field: str, value: object, said: str) -> None:
    error = client.post("/generate", json={"prompt": "x", field: value}).json()["error"]
    assert (error["message"], error["param"]) == (said, field)
