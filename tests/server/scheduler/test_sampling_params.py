import math

import pytest

from prefix_store.errors import InvalidRequest
from server.scheduler.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 101.0),
        ("presence_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("frequency_penalty", 2.1),
        ("frequency_penalty", math.nan),
        ("logit_bias", ((5, 100.5),)),
        ("logit_bias", ((5, math.inf),)),
        ("logit_bias", ((-1, 1.0),)),
        ("logit_bias", ((2**63, 1.0),)),
        ("logit_bias", tuple((token, 1.0) for token in range(1025))),
        ("min_tokens", -1),
        ("min_tokens", 129),
        ("stop_token_ids", frozenset({2**63})),
        ("seed", 2**64),
        ("logprobs", 21),
        ("stop", ("",)),
        ("stop", ("x",) * 17),
        ("num_beams", 0),
        ("num_beams", 65),
        ("length_penalty", math.nan),
        ("length_penalty", 0.5),
        ("early_stopping", True),
        ("early_stopping", "never"),
    ],
)
def test_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field


def test_the_ends_of_every_range_are_taken():
    biases = tuple((token, 100.0 if token % 2 else -100.0) for token in range(1024))
    SamplingParams(max_tokens=5, min_tokens=5, presence_penalty=-2.0, frequency_penalty=2.0, logit_bias=biases)
    SamplingParams(repetition_penalty=0.01, logprobs=0, min_p=1.0, top_p=1.0)
    SamplingParams(repetition_penalty=100.0, logprobs=20, seed=-(2**63))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0.5),
        ("top_p", 0.9),
        ("top_k", 5),
        ("min_p", 0.1),
        ("stop", ("x",)),
        ("max_tokens", 0),
        ("length_penalty", 10.5),
        ("length_penalty", math.inf),
    ],
)
def test_what_does_not_go_with_beams_is_refused_by_name(field, value):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(num_beams=2, echo=True, **{field: value})
    assert caught.value.param == field


def test_beams_go_with_what_does_not_draw():
    for temperature in (0.0, 1.0):
        SamplingParams(num_beams=64, temperature=temperature, seed=5, min_tokens=3, logprobs=2, repetition_penalty=2.0)
    SamplingParams(num_beams=2, length_penalty=-10.0, early_stopping="never")


def test_only_an_echo_may_ask_for_no_tokens():
    SamplingParams(max_tokens=0, echo=True)
    with pytest.raises(InvalidRequest, match="from 1 to 1000000, got 0"):
        SamplingParams(max_tokens=0)
    with pytest.raises(InvalidRequest):
        SamplingParams(max_tokens=-1, echo=True)


def test_too_many_min_tokens_are_refused_with_what_they_may_be():
    with pytest.raises(InvalidRequest, match="min_tokens must be from 0 to max_tokens, which is 4, got 5"):
        SamplingParams(max_tokens=4, min_tokens=5)


@pytest.mark.parametrize(("temperature", "greedy"), [(0.0, True), (5e-324, True), (1e-300, True), (0.01, False)])
def test_temperatures_too_small_to_divide_by_are_greedy(temperature, greedy):
    assert SamplingParams(temperature=temperature).is_greedy is greedy
