import pytest
import torch

from trainer import objective


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
