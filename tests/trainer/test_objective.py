import pytest
import torch

from prefix_store.model.example import Example, TopTokens
from trainer import objective
from trainer.forward import Group


def test_nats_are_summed_over_the_labels():
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    log_p = logits.log_softmax(-1)
    expected = -(log_p[0, 7] + log_p[1, 0] + log_p[2, 9])
    torch.testing.assert_close(objective.nats(logits, torch.tensor([7, 0, 9])), expected)


def test_halves_are_summed_in_full_precision():
    logits = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(4096, dtype=torch.long)
    half = logits.bfloat16()
    assert objective.nats(half, labels).item() == pytest.approx(objective.nats(half.float(), labels).item(), rel=1e-6)


def mean_loss(logits: torch.Tensor, group: Group) -> torch.Tensor:
    """Taken in two parts, as a large vocabulary is."""
    measure, half = objective.of(group.examples), len(logits) // 2
    parts = (slice(0, half), slice(half, len(logits)))
    return torch.stack([measure(logits[part], part) for part in parts]).sum() / len(logits)


def taught(labels: torch.Tensor, ids: torch.Tensor, probabilities: torch.Tensor) -> Group:
    """One example with a token in front, whose others count and have a teacher."""
    return Group(None, [Example((0, *labels.tolist()), 1, teacher=TopTokens(ids.int(), probabilities.half()))])


def test_without_a_teacher_the_loss_is_that_of_the_labels():
    group = Group(None, [Example((0, 5, 3, 2), 2), Example((0, 9), 1)])
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([3, 2, 9]))
    torch.testing.assert_close(mean_loss(logits, group), expected)


def test_with_a_teacher_it_is_the_cross_entropy_to_what_the_teacher_named():
    generator = torch.Generator().manual_seed(0)
    logits, said = (torch.randn(3, 50, generator=generator) for _ in range(2))
    best = said.softmax(1).topk(20)
    group = taught(torch.tensor([1, 2, 3]), best.indices, best.values)
    p, log_q = best.values, logits.log_softmax(1)
    named = [[int(index) for index in row] for row in best.indices]
    expected = -sum(p[c, k] * log_q[c, token] for c in range(3) for k, token in enumerate(named[c])) / 3
    for c in range(3):
        others = [token for token in range(50) if token not in named[c]]
        expected -= said.softmax(1)[c, others].sum() * log_q[c, others].exp().sum().log() / 3
    assert mean_loss(logits, group).item() == pytest.approx(expected.item(), rel=1e-3)  # p is kept in 16 bits
    swapped = taught(torch.tensor([1, 2, 3]), best.indices.flip(1), best.values)
    assert mean_loss(logits, swapped).item() != pytest.approx(expected.item(), rel=0.02)


@pytest.mark.parametrize("vocabulary", [20, 500])  # all of it named, or a part
def test_it_is_least_where_student_and_teacher_agree(vocabulary):
    said = torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(0))
    best = said.softmax(1).topk(20)
    group = taught(torch.tensor([1, 2, 3, 4]), best.indices, best.values)
    logits = said.clone().requires_grad_()
    mean_loss(logits, group).backward()
    assert logits.grad.abs().max() < 1e-3
    least = mean_loss(said, group)
    for seed in range(5):
        noise = torch.randn(said.shape, generator=torch.Generator().manual_seed(seed))
        assert mean_loss(said + 0.3 * noise, group) > least
