import torch

from trainer.methods.tuned import Tuned

START, UNIT = torch.tensor([[1.0, -2.0], [30.0, 0.5]]), torch.tensor([[0.1], [10.0]])


def test_it_starts_where_it_starts():
    assert torch.equal(Tuned(START, UNIT).value(), START)


def test_a_step_moves_by_the_rate_in_units():
    tuned = Tuned(START, UNIT)
    optimiser = torch.optim.AdamW([tuned.delta], lr=0.5, weight_decay=0.0)
    tuned.value().sum().backward()
    optimiser.step()
    torch.testing.assert_close(tuned.value().detach(), START - 0.5 * UNIT)


def test_decay_leads_back_to_the_start():
    tuned = Tuned(START, UNIT)
    tuned.delta.data += 1
    optimiser = torch.optim.AdamW([tuned.delta], lr=0.5, weight_decay=1.0)
    (0 * tuned.value()).sum().backward()
    for _ in range(30):
        optimiser.step()
    torch.testing.assert_close(tuned.value().detach(), START)
