from __future__ import annotations

import pytest
import torch

from prefix_store.errors import PrefixMismatch
from trainer.failures import explain
from trainer.job_run import NoImprovement
from trainer.memory import TooLarge


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (PrefixMismatch("of another size"), "prefix_mismatch", "of another size"),
        (FloatingPointError("became nan"), "training_diverged", "became nan"),
        (NoImprovement("no better"), "no_improvement", "no better"),
        (TooLarge("takes 9 MB"), "out_of_memory", "takes 9 MB"),
        (torch.OutOfMemoryError("CUDA"), "out_of_memory", "a smaller batch_size or max_length takes less (CUDA)"),
        (MemoryError(), "out_of_memory", "takes less (MemoryError)"),
        (RuntimeError("DefaultCPUAllocator: can't"), "out_of_memory", "takes less (DefaultCPUAllocator: can't)"),
    ],
)
def test_what_can_go_wrong_has_a_code(error, code, words, capsys):
    found = explain(error)
    assert found.code == code
    assert found.message.endswith(words)
    assert capsys.readouterr().err == ""


def test_what_nobody_foresaw_is_printed_too(capsys):
    assert explain(RuntimeError("odd")).message == "RuntimeError: odd"
    assert "RuntimeError: odd" in capsys.readouterr().err
