from dataclasses import replace

import pytest

from server.scheduler.messages import GenerationRequest
from server.scheduler.sampling_params import SamplingParams
from server.scheduler.sequence import Sequence


def sequence(seed: int, generated: int = 0, **params) -> Sequence:
    made = Sequence(GenerationRequest("r", "t", (5, 6), SamplingParams(max_tokens=10, **params)), seed)
    made.tokens.extend([7] * generated)
    return made


def test_a_draw_depends_on_the_seed_and_the_index_only():
    assert sequence(3, 2).uniform(4) == sequence(3, 1).uniform(4)
    draws = {sequence(seed).uniform(2 + index) for seed in range(50) for index in range(50)}
    assert len(draws) == 2500
    assert all(0 <= draw < 1 for draw in draws)
    assert abs(sum(draws) / len(draws) - 0.5) < 0.02


def test_negative_and_huge_seeds_draw_too():
    assert 0 <= sequence(-(2**63)).uniform(1) < 1
    assert sequence(-1).uniform(1) != sequence(1).uniform(1)


def test_the_last_token_is_never_computed():
    assert sequence(0).final_length == 2 + 10 - 1


def test_occurrences_are_counted_on_as_the_answer_grows():
    made = sequence(0, 2, repetition_penalty=1.2)
    assert made.occurrences() == {5: 0, 6: 0, 7: 2}
    made.tokens += [6, 7, 8]
    assert made.occurrences() == made.occurrences() == {5: 0, 6: 1, 7: 3, 8: 1}


def test_without_a_repetition_penalty_the_prompt_does_not_count():
    assert sequence(0, 2, presence_penalty=1.0).occurrences() == {7: 2}


def test_the_models_own_ends_are_forbidden_too_unless_they_are_ignored():
    for ignore_eos, expected in ((False, {2, 3}), (True, {3})):
        params = SamplingParams(min_tokens=1, stop_token_ids=frozenset({3}), ignore_eos=ignore_eos)
        assert Sequence(GenerationRequest("r", "t", (5,), params), 0, frozenset({2})).forbidden == expected


@pytest.mark.parametrize(("generated", "forbidden"), [(0, {3, 4}), (2, {3, 4}), (3, set())])
def test_stop_ids_are_forbidden_until_there_are_min_tokens(generated, forbidden):
    assert sequence(0, generated, min_tokens=3, stop_token_ids=frozenset({3, 4})).forbidden == forbidden


@pytest.mark.parametrize(
    "asked", [{"logprobs": 0}, {"num_beams": 2, "temperature": 0.0}, {"presence_penalty": 1.0}, {"min_tokens": 9}]
)
def test_what_needs_the_host_between_two_tokens_is_not_plain(asked):
    assert sequence(0, temperature=0.5, top_p=0.5, stop_token_ids=frozenset({3})).is_plain
    assert not sequence(0, stop_token_ids=frozenset({3}), **asked).is_plain
    request = replace(sequence(0).request, last_id=3)
    assert not Sequence(request, 0).is_plain


def test_a_row_without_options_is_not_adjusted():
    assert not sequence(0, temperature=0.5, top_k=3, top_p=0.5, min_p=0.1, stop_token_ids=frozenset({3})).is_adjusted
    assert not sequence(0, min_tokens=3).is_adjusted
    for asked in ({"repetition_penalty": 0.9}, {"presence_penalty": 1.0}, {"frequency_penalty": -1.0}):
        assert sequence(0, **asked).is_adjusted
    assert sequence(0, logit_bias=((3, 1.0),)).is_adjusted
    assert sequence(0, 2, min_tokens=3, stop_token_ids=frozenset({3})).is_adjusted
    assert not sequence(0, 3, min_tokens=3, stop_token_ids=frozenset({3})).is_adjusted


def test_a_request_is_late_from_its_deadline_on_and_without_one_never():
    made = sequence(0)
    assert not made.is_late(1e9)
    made.request = replace(made.request, deadline=5.0)
    assert [made.is_late(now) for now in (4.9, 5.0, 5.1)] == [False, True, True]
