"""Counts of NaN and Inf, in every floating dtype, at the borders of the pieces it is read in."""

from pathlib import Path

import pytest
import torch

from moequant.checkpoint import check_finite
from moequant.checkpoint.finite import _CHUNK
from moequant.errors import CheckpointError

NAN, INF = float("nan"), float("inf")
WITH_INF = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]
ONLY_NAN = [
    torch.float8_e4m3fn,
    torch.float8_e8m0fnu,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
]


def message(tensor: torch.Tensor, file: Path | None = None) -> str:
    with pytest.raises(CheckpointError) as error:
        check_finite("model.layers.3.mlp.up_proj.weight", tensor, file)
    return str(error.value)


@pytest.mark.parametrize("dtype", WITH_INF, ids=str)
def test_counts_both(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[1.0, NAN, -INF], [INF, NAN, NAN]]).to(dtype)
    assert "model.layers.3.mlp.up_proj.weight has 3 NaN and 2 Inf among 6 values" in message(tensor)


@pytest.mark.parametrize("dtype", ONLY_NAN, ids=str)
def test_dtypes_without_inf(dtype: torch.dtype) -> None:
    tensor = torch.tensor([1.0, NAN, 2.0]).to(dtype)
    assert "has 1 NaN among 3 values" in message(tensor)


@pytest.mark.parametrize("dtype", WITH_INF + ONLY_NAN, ids=str)
def test_every_finite_value_passes(dtype: torch.dtype) -> None:
    """The largest of the dtype, many times: no sum that could overflow decides."""
    check_finite("w", torch.full((1000,), torch.finfo(dtype).max, dtype=torch.float64).to(dtype))


@pytest.mark.parametrize("place", [0, _CHUNK - 1, _CHUNK, 2 * _CHUNK, 2 * _CHUNK + 4])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_one_bad_value_anywhere(place: int, value: float) -> None:
    tensor = torch.zeros(2 * _CHUNK + 5, dtype=torch.bfloat16)
    tensor[place] = value
    kind = "NaN" if value != value else "Inf"
    assert f"has 1 {kind} among {2 * _CHUNK + 5} values" in message(tensor)


def test_file_and_remedy_are_named() -> None:
    text = message(torch.tensor(INF), Path("/models/x/model-00002-of-00003.safetensors"))
    assert text.startswith("model-00002-of-00003.safetensors: model.layers.3.mlp.up_proj.weight")
    assert "download the file again" in text


def test_complex() -> None:
    assert "1 NaN and 1 Inf among 2" in message(torch.tensor([complex(NAN, INF), 1j]))


def test_what_cannot_be_bad_passes() -> None:
    check_finite("w", torch.empty(0, 5))
    check_finite("w", torch.tensor([True]))
    check_finite("w", torch.tensor([2**62]))
    check_finite("w", torch.zeros(3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2))
    check_finite("w", torch.nn.Parameter(torch.ones(3, 3)).t())
