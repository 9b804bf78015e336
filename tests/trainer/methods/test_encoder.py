from __future__ import annotations

import torch

from trainer.methods.encoder import Encoder

P, WIDTH, MIDDLE, NUMBERS = 6, 8, 16, 10
SPREAD = torch.logspace(-2, 1, NUMBERS)
TARGET = SPREAD * torch.randn(P, NUMBERS, generator=torch.Generator().manual_seed(0))


def make(middle: int = MIDDLE, seed: int = 0, width: int = WIDTH) -> Encoder:
    def body() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(width, middle), torch.nn.Tanh())

    return Encoder(body, width, TARGET, SPREAD, seed)


def adam_fit(target: torch.Tensor, steps: int) -> torch.Tensor:
    """Li & Liang's activation fit: Adam at 1e-4 on the squared error of the same network, embeddings held."""
    torch.manual_seed(0)
    embeddings = torch.randn(P, WIDTH)
    network = torch.nn.Sequential(torch.nn.Linear(WIDTH, MIDDLE), torch.nn.Tanh(), torch.nn.Linear(MIDDLE, NUMBERS))
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        torch.nn.functional.mse_loss(network(embeddings), target).backward()
        optimiser.step()
    return network(embeddings).detach()


def error(output: torch.Tensor) -> float:
    return ((output - TARGET) / SPREAD).square().mean().item()


def test_it_starts_at_its_target():
    assert error(make().output()) < 1e-9


def test_what_adam_is_led_to_is_where_the_fit_begins():
    errors = [torch.nn.functional.mse_loss(adam_fit(TARGET, steps), TARGET).item() for steps in (0, 30, 3000)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 * errors[0]
    assert torch.nn.functional.mse_loss(make().output(), TARGET).item() < errors[-1]


def test_a_bottleneck_narrower_than_the_prefix_starts_as_near_as_it_can():
    near, far = error(make(middle=3).output()), TARGET.div(SPREAD).square().mean().item()
    assert 1e-3 < near < far


def test_the_virtual_tokens_that_the_fit_met_can_part():
    """A network that gave one row for all would be as good a fit for equal rows, and stay so."""
    assert torch.linalg.matrix_rank(make().embeddings.start) == P


def test_a_step_moves_every_weight_by_the_rate_in_units_of_its_spread():
    encoder, rate = make(), 0.01
    optimiser = torch.optim.AdamW(encoder.parameters(), lr=rate, weight_decay=0.0)
    (encoder.output() / SPREAD).square().sum().backward()
    optimiser.step()
    drawn = 1 / 3**0.5  # of a uniform draw from -1 to 1
    usual = {
        "0.0.weight": drawn / WIDTH**0.5,
        "0.0.bias": drawn / WIDTH**0.5,
        "1.weight": SPREAD[:, None] * drawn / MIDDLE**0.5,
        "1.bias": SPREAD * drawn / MIDDLE**0.5,
    }
    for name, tuned in encoder.weights.items():
        moved = (tuned.value() - tuned.start).detach().abs() / (rate * usual[name])
        assert ((moved > 0.5) & (moved < 1.5)).all(), name
    moved = encoder.embeddings.value() - encoder.embeddings.start
    torch.testing.assert_close(moved.norm(dim=1), torch.full((P,), rate), rtol=1e-3, atol=0.0)


def test_every_weight_gets_a_gradient():
    encoder = make()
    encoder.output().square().sum().backward()
    assert [parameter.shape for parameter in encoder.parameters()] == [
        (P, WIDTH), (MIDDLE, WIDTH), (MIDDLE,), (NUMBERS, MIDDLE), (NUMBERS,)
    ]  # fmt: skip
    assert all(parameter.grad.any() for parameter in encoder.parameters())


def test_equal_seeds_draw_equal_networks_and_leave_torch_s_own_draws_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = make(), make(), make(seed=1)
    assert torch.equal(torch.rand(3), expected)
    for one, two in zip(first.weights.values(), again.weights.values(), strict=True):
        assert torch.equal(one.start, two.start)
    assert not torch.equal(first.embeddings.start, other.embeddings.start)
