from server.scheduler.messages import GenerationRequest
from server.scheduler.sampling_params import SamplingParams
from server.scheduler.sequence import Sequence


def sequence(seed: int, generated: int = 0) -> Sequence:
    made = Sequence(GenerationRequest("r", "t", (5, 6), SamplingParams(max_tokens=10)), seed)
    made.tokens.extend([7] * generated)
    return made


def test_a_draw_depends_on_the_seed_and_the_index_only():
    assert sequence(3, 2).uniform() == sequence(3, 2).uniform()
    draws = {sequence(seed, index).uniform() for seed in range(50) for index in range(50)}
    assert len(draws) == 2500
    assert all(0 <= draw < 1 for draw in draws)
    assert abs(sum(draws) / len(draws) - 0.5) < 0.02


def test_negative_and_huge_seeds_draw_too():
    assert 0 <= sequence(-(2**63)).uniform() < 1
    assert sequence(-1).uniform() != sequence(1).uniform()


def test_the_last_token_is_never_computed():
    assert sequence(0).final_length == 2 + 10 - 1
