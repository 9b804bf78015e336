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


def stretches(mask: Mask, window: int) -> torch.Tensor:
    """Queries 0 to 109 see what came before them and a prefix, queries 110 to 139 a part of their own sequence."""
    return torch.tensor(
        [
            WorkItem(Part.OWN, mask, 0, 110, 100, 217, 27, 20).as_tuple(),
            WorkItem(Part.OWN, mask, 110, 140, 300, 330, 20, 20).as_tuple(),
            WorkItem(Part.PREFIX, Mask.WINDOW if window else Mask.FULL, 0, 110, 10, 30, 27, 0).as_tuple(),
        ]
    )


@pytest.mark.parametrize(("query_heads", "kv_heads", "size"), [(12, 4, 64), (4, 4, 40), (8, 1, 128), (200, 1, 8)])
@pytest.mark.parametrize(
    ("mask", "window", "softcap"),
    [(Mask.FULL, 0, 0.0), (Mask.CAUSAL, 0, 0.0), (Mask.CAUSAL, 0, 5.0), (Mask.WINDOW, 50, 0.0), (Mask.WINDOW, 9, 2.0)],
)
def test_stretches_of_queries_see_what_their_mask_shows_them(
    numbers, query_heads, kv_heads, size, mask, window, softcap
):
    draws = torch.Generator().manual_seed(1)
    query = torch.randn(140, query_heads, size, generator=draws)
    keys, values = (torch.randn(400, kv_heads, size, generator=draws) for _ in range(2))
    options = {"window": window, "scale": 0.2, "softcap": softcap}
    expected = BACKENDS["plain"](query, keys, values, stretches(mask, window), **options)
    got = BACKENDS["native"](query, keys, values, stretches(mask, window), **options)
    assert float((got - expected).abs().max()) < 2e-5
    other = BACKENDS["native"](query, keys, values, stretches(Mask.CAUSAL, 0), **options | {"softcap": 1.0})
    assert float((other - expected).abs().max()) > 1e-2


@pytest.mark.parametrize("reach", [2, 30, 200])
@pytest.mark.parametrize(("query_heads", "kv_heads"), [(6, 2), (4, 4)])
@pytest.mark.parametrize("mask", [Mask.FULL, Mask.CAUSAL])
def test_a_bias_is_by_head_and_by_how_far_the_key_is_from_the_query(numbers, mask, query_heads, kv_heads, reach):
    """Of stretches of queries, with a prefix before them and without, and of rows by themselves."""
    draws = torch.Generator().manual_seed(1)
    query = torch.randn(142, query_heads, 40, generator=draws)
    keys, values = (torch.randn(400, kv_heads, 40, generator=draws) for _ in range(2))
    bias = torch.randn(query_heads, 2 * reach + 1, generator=draws)
    rows = [
        WorkItem(Part.OWN, Mask.FULL, 140, 141, 330, 370, 44, 5).as_tuple(),
        WorkItem(Part.PREFIX, Mask.FULL, 140, 141, 20, 25, 44, 0).as_tuple(),
        WorkItem(Part.OWN, Mask.FULL, 141, 142, 370, 399, 28, 0).as_tuple(),
    ]
    work = torch.cat([stretches(mask, 0), torch.tensor(rows)])
    options = {"window": 0, "scale": 0.2, "softcap": 0.0}
    expected = BACKENDS["plain"](query, keys, values, work, **options, bias=bias)
    got = BACKENDS["native"](query, keys, values, work, **options, bias=bias)
    assert float((got - expected).abs().max()) < 2e-5
    for wrong in (bias.roll(1, 0), bias.flip(1), None):
        other = BACKENDS["native"](query, keys, values, work, **options, bias=wrong)
        assert float((other - expected)[:110].abs().max()) > 1e-2
        assert float((other - expected)[140].abs().max()) > 1e-2


def test_a_query_is_the_same_bits_in_a_chunk_and_in_the_whole(numbers):
    _, keys, values = numbers
    query = torch.randn(20, 6, 64, generator=torch.Generator().manual_seed(2))
    whole = run(query, keys, values, torch.tensor([WorkItem(Part.OWN, Mask.CAUSAL, 0, 20, 5, 25, 0, 0).as_tuple()]))
    chunk = torch.tensor([WorkItem(Part.OWN, Mask.CAUSAL, 0, 12, 5, 25, 8, 0).as_tuple()])
    assert torch.equal(run(query[8:], keys, values, chunk), whole[8:])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_in_a_stretch_too_what_overflows_stays_in_its_sequence(numbers, bad):
    _, keys, values = numbers
    query = torch.randn(22, 6, 64, generator=torch.Generator().manual_seed(2))
    items = [
        WorkItem(Part.OWN, Mask.CAUSAL, 11 * row, 11 * row + 11, lo, lo + 11, 0, 0) for row, lo in ((0, 5), (1, 18))
    ]
    work = torch.tensor([item.as_tuple() for item in items])
    sound = run(query, keys, values, work)
    for kind in (keys, values):
        broken = kind.clone()
        broken[10] = bad
        got = run(query, *((broken, values) if kind is keys else (keys, broken)), work)
        assert not got[5:11].isfinite().all(dim=2).any()
        assert torch.equal(got[11:], sound[11:])


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
    monkeypatch.setattr(compiled, "_cache", lambda: tmp_path)
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
