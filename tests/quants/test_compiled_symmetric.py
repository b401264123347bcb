"""The compiled search over 16 lanes: fp16 without branches, strictly no worse than ggml."""

import numpy as np
import pytest
import torch

from moequant.quants import QUANT_TYPES, compiled, dequantize, quantize
from moequant.quants.compiled_symmetric import near_half
from tests.oracles.ggml import Ggml, weighted_error


@compiled.jit
def _near_halves(x: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(x)):
        out[i] = near_half(x[i])


def test_near_half_is_as_near_as_fp16_gets() -> None:
    every = np.arange(0, 0x7F800000, 4999, dtype=np.int64).astype(np.int32).view(np.float32)
    halves = np.arange(0, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (halves[1:] + halves[:-1]) / 2
    x = np.concatenate([every, halves, ties])
    x = np.concatenate([x, -x])
    near = np.empty_like(x)
    _near_halves(x, near)
    assert np.array_equal(near.astype(np.float16).astype(np.float32), near)
    nearest = np.clip(x, -65504, 65504).astype(np.float16).astype(np.float32)
    assert np.array_equal(np.abs(near - x), np.abs(nearest - x))


@pytest.mark.parametrize("name", ["Q3_K", "Q6_K"])
def test_a_group_without_weight_is_encoded_all_the_same(name: str) -> None:
    x = torch.randn(5, 512)
    importance = torch.ones(512)
    importance[32:48] = 0
    decoded = dequantize(quantize(x, name, importance, compiled=True), name, 512)
    missed = (decoded - x)[:, 32:48].square().sum() / x[:, 32:48].square().sum()
    assert missed < 0.1
    nothing = quantize(x, name, torch.zeros(512), compiled=True)
    assert (dequantize(nothing, name, 512) - x).square().mean() < 0.1


def test_mxfp4_takes_another_exponent_only_where_a_block_gains(ggml: Ggml) -> None:
    x = torch.randn(4096, 32) * torch.randn(4096, 1).exp()
    importance = torch.randn(32).square() ** 2
    ours, theirs = quantize(x, "MXFP4", importance, compiled=True), ggml.quantize(x, "MXFP4")
    changed = (ours[:, 0].int() - theirs[:, 0].int()).sign()
    assert {-1, 0, 1} <= set(changed.tolist())
    errors = [
        weighted_error(x, dequantize(data, "MXFP4", 32), importance) for data in (ours, theirs)
    ]
    assert (errors[0] <= errors[1] * (1 + 1e-6)).all()
    assert (errors[0][changed != 0] < errors[1][changed != 0]).all()


def error_ratio(
    ggml: Ggml, x: torch.Tensor, name: str, importance: torch.Tensor | None
) -> torch.Tensor:
    """Our weighted error over ggml's."""
    cols = x.shape[1]
    assert cols % QUANT_TYPES[name].block_size == 0
    ours = dequantize(quantize(x, name, importance, compiled=True), name, cols)
    theirs = ggml.dequantize(ggml.quantize(x, name, importance), name, cols)
    error, bound = (weighted_error(x, values, importance).sum() for values in (ours, theirs))
    return error / bound
