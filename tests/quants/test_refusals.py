"""What quantize and dequantize refuse, and in what words."""

import pytest
import torch

from moequant.quants import CODECS, QUANT_TYPES, dequantize, quantize, row_bytes

BLOCKED = [name for name, layout in QUANT_TYPES.items() if layout.block_size > 1]


@pytest.mark.parametrize("name", BLOCKED)
def test_columns_that_blocks_do_not_divide(name: str) -> None:
    size = QUANT_TYPES[name].block_size
    for cols in (size - 1, size + size // 2):
        with pytest.raises(ValueError, match=f"{name} needs rows of a multiple of {size}: {cols}"):
            quantize(torch.zeros(2, cols), name)
        with pytest.raises(ValueError, match="multiple"):
            row_bytes(name, cols)


@pytest.mark.parametrize("name", QUANT_TYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(name: str, bad: float) -> None:
    x = torch.zeros(2, 256)
    x[1, 7] = bad
    with pytest.raises(ValueError, match=r"1 NaN or Inf of 512"):
        quantize(x, name)


@pytest.mark.parametrize("name", QUANT_TYPES)
def test_importance(name: str) -> None:
    x = torch.zeros(2, 256)
    for wrong in (torch.ones(255), torch.ones(2, 256), torch.ones(256, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"importance must be float32 \[256\]"):
            quantize(x, name, wrong)
    for bad in (-1.0, float("nan"), float("inf")):
        importance = torch.ones(256)
        importance[3] = bad
        with pytest.raises(ValueError, match="importance has 1 negative, NaN or Inf of 256"):
            quantize(x, name, importance)


@pytest.mark.parametrize("compiled", [None, False])
@pytest.mark.parametrize("name", QUANT_TYPES)
def test_values_beyond_the_scales_are_refused_and_those_at_the_limit_are_not(
    name: str, compiled: bool | None
) -> None:
    limit = CODECS[name].limit
    x = torch.full((1, 256), limit)
    x[0, ::2] = -limit
    decoded = dequantize(quantize(x, name, compiled=compiled), name, 256)
    assert decoded.isfinite().all()
    # Q3_K's levels -4..3 cannot span both signs evenly, and err by a quarter at one of them.
    assert ((decoded - x).abs() <= 0.3 * limit).all()
    if limit < 1e38:
        with pytest.raises(ValueError, match=f"{name} holds"):
            quantize(x * 1.01, name, compiled=compiled)


def test_shape_dtype_and_name() -> None:
    with pytest.raises(ValueError, match="unknown type 'Q9_K'"):
        quantize(torch.zeros(1, 256), "Q9_K")
    with pytest.raises(ValueError, match="must be float32"):
        quantize(torch.zeros(1, 256, dtype=torch.float16), "Q4_K")
    with pytest.raises(ValueError, match="rows, cols"):
        quantize(torch.zeros(256), "Q4_K")


def test_data_of_another_size() -> None:
    data = quantize(torch.zeros(2, 256), "Q4_K")
    for wrong, cols in ((data, 512), (data[:, 1:], 256), (data.int(), 256), (data[0], 256)):
        with pytest.raises(ValueError, match="Q4_K rows of"):
            dequantize(wrong, "Q4_K", cols)


@pytest.mark.parametrize("name", QUANT_TYPES)
def test_no_rows(name: str) -> None:
    empty = quantize(torch.zeros(0, 256), name)
    assert empty.shape == (0, row_bytes(name, 256))
    assert dequantize(empty, name, 256).shape == (0, 256)


@pytest.mark.parametrize("name", QUANT_TYPES)
def test_bad_importance_is_refused_even_where_it_is_not_used(name: str) -> None:
    with pytest.raises(ValueError, match="importance has 256 negative, NaN or Inf of 256"):
        quantize(torch.zeros(2, 256), name, torch.full((256,), -1.0))


@pytest.mark.parametrize("name", [name for name in CODECS if not CODECS[name].weighted])
def test_importance_that_is_not_used_costs_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither F32, which is a copy, nor types without a search scale it first."""
    x, importance = torch.randn(2, 256), torch.rand(256)
    expected = quantize(x, name)
    monkeypatch.delattr("moequant.quants._normalised")
    assert torch.equal(quantize(x, name, importance), expected)
