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
        ("seed", 2**64),
        ("logprobs", 21),
        ("stop", ("",)),
        ("stop", ("x",) * 17),
    ],
)
def test_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field


@pytest.mark.parametrize(("temperature", "greedy"), [(0.0, True), (5e-324, True), (1e-300, True), (0.01, False)])
def test_temperatures_too_small_to_divide_by_are_greedy(temperature, greedy):
    assert SamplingParams(temperature=temperature).is_greedy is greedy
