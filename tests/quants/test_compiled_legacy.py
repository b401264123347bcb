"""Compiled types of 32 values: lanes, blocks of one value, mirrored blocks, heavy columns."""

import pytest
import torch

from moequant.quants import QUANT_TYPES, dequantize, kernels, quantize
from tests.oracles.ggml import Ggml, weighted_error

SEARCHED = ("Q4_0", "Q5_0", "Q4_1", "Q5_1")


@pytest.mark.parametrize("name", SEARCHED)
def test_a_block_does_not_know_who_shares_its_lanes(name: str) -> None:
    x, weights = torch.randn(37, 32).numpy(), torch.rand(3, 32).numpy()
    x[7] = 0.3  # not searched: those after it move up a lane
    size = QUANT_TYPES[name].type_size
    together = torch.empty(37, size, dtype=torch.uint8).numpy()
    kernels()[name](x, weights, 0, together)
    for i in (0, 6, 8, 16, 36):
        alone = torch.empty(1, size, dtype=torch.uint8).numpy()
        kernels()[name](x[i : i + 1], weights, i, alone)
        assert (alone == together[i]).all(), i


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1"])
def test_a_block_of_one_value_keeps_both_parts_of_it(name: str) -> None:
    x = torch.linspace(-3, 5, 200).unsqueeze(1).repeat(1, 32)
    for importance in (None, torch.rand(32)):
        decoded = dequantize(quantize(x, name, importance, compiled=True), name, 32)
        # fp16 alone is off by up to 2^-12 of the value.
        assert ((decoded - x).abs() <= x.abs() * 2.0**-20 + 2.0**-24).all()


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0"])
def test_a_block_that_reaches_both_ways_alike_is_searched(name: str, ggml: Ggml) -> None:
    half = 8 if name == "Q4_0" else 16
    x = torch.randint(1 - half, half, (40, 32)).float() / 8
    x[:, 0], x[:, 1] = (half - 1) / 8, (1 - half) / 8
    ours = dequantize(quantize(x, name, compiled=True), name, 32)
    assert torch.equal(ours, x)
    assert (weighted_error(x, ggml.dequantize(ggml.quantize(x, name), name, 32), None) > 0).any()
