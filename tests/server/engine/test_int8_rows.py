import pytest
import torch

from server.engine import compiled, int8_rows
from server.engine.int8_rows import ZERO_POINT, round_rows, scale_rows


@pytest.fixture(params=["native", "torch"], autouse=True)
def way(request, monkeypatch, tmp_path):
    """Every test runs with the compiled functions and as if there were no compiler."""
    int8_rows._library.cache_clear()
    if request.param == "torch":
        monkeypatch.setattr(compiled, "COMPILERS", ("no-such-compiler",))
        monkeypatch.setattr(compiled, "_cache", lambda: tmp_path)
    elif int8_rows._library() is None:
        pytest.skip("no C compiler")
    assert (int8_rows._library() is None) == (request.param == "torch")
    yield request.param
    int8_rows._library.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_back_to_within_half_a_unit(dtype):
    x = (torch.randn(6, 70) * torch.logspace(-3, 3, 6)[:, None]).to(dtype)
    rounded, scales = round_rows(x)
    assert (rounded.dtype, scales.dtype) == (torch.uint8, torch.float32)
    back = (rounded.float() - ZERO_POINT) * scales[:, None]
    worst = (back - x.float()).abs().amax(1) / x.float().abs().amax(1)
    assert float(worst.max()) <= 0.5001 / 127
    assert (rounded.int() - ZERO_POINT).abs().amax(1).tolist() == [127] * 6
    swapped = (rounded.float() - ZERO_POINT) * scales.flip(0)[:, None]
    assert float((swapped - x.float()).abs().max()) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_scaled_by_their_row_and_moved_by_the_bias(dtype):
    products, scales, bias = torch.randn(4, 50) * 1000, torch.rand(4) / 100, torch.randn(50)
    got = scale_rows(products, scales, bias, dtype)
    assert got.dtype is dtype
    torch.testing.assert_close(
        got, (products * scales[:, None] + bias).to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5
    )


def test_a_row_of_zeros_or_nearly_is_zeros():
    x = torch.zeros(3, 40)
    x[1], x[2] = 1e-30, 1.0
    rounded, scales = round_rows(x)
    assert rounded[:2].unique().tolist() == [ZERO_POINT]
    assert scales[:2].abs().max() < 1e-20


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_has_no_finite_scale(bad):
    x = torch.randn(3, 40)
    x[1, 7] = bad
    rounded, scales = round_rows(x)
    assert scales.isfinite().tolist() == [True, False, True]
    assert scale_rows(rounded.float(), scales, torch.zeros(40), torch.bfloat16)[1].isnan().all()


def test_strided_rows_are_read_as_they_lie():
    x = torch.randn(40, 5).t()
    assert torch.equal(round_rows(x)[0], round_rows(x.contiguous())[0])


def test_a_library_that_computes_something_else_is_not_used(way, monkeypatch):
    if way == "torch":
        pytest.skip("there is none")
    monkeypatch.setattr(int8_rows, "_agrees", lambda library: False)
    int8_rows._library.cache_clear()
    assert int8_rows._library() is None
    assert round_rows(torch.ones(1, 4))[0].tolist() == [[255] * 4]
