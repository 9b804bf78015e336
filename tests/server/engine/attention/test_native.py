import pytest
import torch

from server.engine import compiled
from server.engine.attention import BACKENDS, native
from server.engine.attention.work import Mask, Part, WorkItem
from tests.models import tiny_frozen

WORK = torch.tensor(
    [
        WorkItem(Part.OWN, Mask.FULL, 0, 1, 10, 17, 10, 3).as_tuple(),
        WorkItem(Part.OWN, Mask.FULL, 1, 2, 20, 21, 3, 3).as_tuple(),
        WorkItem(Part.PREFIX, Mask.FULL, 0, 1, 2, 5, 10, 0).as_tuple(),
    ]
)


@pytest.fixture
def numbers() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if not native.is_available(torch.float32):
        pytest.skip("no C compiler, so no native attention")
    draws = torch.Generator().manual_seed(0)
    return torch.randn(2, 6, 64, generator=draws), *(torch.randn(30, 2, 64, generator=draws) for _ in range(2))


def run(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, work: torch.Tensor = WORK) -> torch.Tensor:
    return BACKENDS["native"](query, keys, values, work, window=0, scale=0.125, softcap=0.0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("slot", [3, 12])
def test_what_overflows_is_seen_in_its_row_and_in_no_other(numbers, bad, slot):
    query, keys, values = numbers
    sound = run(query, keys, values)
    for broken in (keys.clone(), values.clone()):
        broken[slot] = bad
        got = run(query, *((broken, values) if torch.equal(broken[:2], keys[:2]) else (keys, broken)))
        assert not got[0].isfinite().all()
        assert torch.equal(got[1], sound[1])


def test_a_row_is_the_same_bits_whatever_its_neighbours(numbers):
    query, keys, values = numbers
    together = run(query, keys, values)
    alone = run(query[1:], keys, values, torch.tensor([WorkItem(Part.OWN, Mask.FULL, 0, 1, 20, 21, 3, 3).as_tuple()]))
    assert torch.equal(together[1:], alone)


def test_strided_queries_are_read_as_they_lie(numbers):
    query, keys, values = numbers
    strided = query.transpose(0, 1).contiguous().transpose(0, 1)
    assert strided.stride() != query.stride()
    assert torch.equal(run(strided, keys, values), run(query, keys, values))


def test_scores_far_apart_and_far_from_zero(numbers):
    query, keys, values = numbers
    expected = BACKENDS["plain"](100 * query, keys, values, WORK, window=0, scale=1.0, softcap=0.0)
    got = BACKENDS["native"](100 * query, keys, values, WORK, window=0, scale=1.0, softcap=0.0)
    assert float((got - expected).abs().max()) < 1e-4


def test_half_precision_keys_are_read_as_what_they_are(numbers):
    query, *kv = numbers
    keys, values = (part.bfloat16() for part in kv)
    exact = run(query, keys.float(), values.float())
    assert float((run(query, keys, values) - exact).abs().max()) < 1e-6
    rounded = run(query.bfloat16(), keys, values)
    assert rounded.dtype is torch.bfloat16
    assert 0 < float((rounded.float() - exact).abs().max()) < 0.05


def test_without_a_compiler_torchs_kernel_serves(monkeypatch, tmp_path):
    from server.engine import engine

    monkeypatch.setattr(compiled, "COMPILERS", ("no-such-compiler",))
    native._library.cache_clear()
    try:
        assert not native.is_available(torch.float32)
        assert engine.default_backend(tiny_frozen("llama")) == "cpu"
    finally:
        native._library.cache_clear()


def test_a_library_that_computes_something_else_is_not_used(monkeypatch):
    if not native.is_available(torch.float32):
        pytest.skip("no C compiler, so no native attention")
    monkeypatch.setattr(native, "_agrees", lambda library: False)
    native._library.cache_clear()
    try:
        assert not native.is_available(torch.float32)
    finally:
        native._library.cache_clear()
