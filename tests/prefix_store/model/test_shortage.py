import pytest
import torch

from prefix_store.model import shortage


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_no_more_memory_is_told_in_many_ways(error: Exception) -> None:
    assert shortage.ran_out(error)


def test_what_torch_raises_on_a_cpu_is_one_of_them() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.uint8)
    assert shortage.ran_out(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("device lost"), ValueError("out of memory"), KeyError("x")])
def test_other_failures_are_none(error: Exception) -> None:
    assert not shortage.ran_out(error)
