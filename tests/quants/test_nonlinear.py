"""What is special to IQ4_NL, IQ4_XS and MXFP4: codebooks, exponents, and blocks hard to fit."""

import pytest
import torch

from moequant.quants import nonlinear
from moequant.quants.blocks import Scales
from moequant.quants.nonlinear import CODECS, IQ4_VALUES, MXFP4_VALUES

BLOCK = {"IQ4_NL": 32, "IQ4_XS": 256, "MXFP4": 32}


def test_iq4_table_finds_the_nearest_value() -> None:
    v = torch.linspace(-140, 125, 26501)
    values = torch.tensor(IQ4_VALUES).float()
    nearest = (v[:, None] - values).abs().amin(1)
    found = nonlinear._iq4_nearest(v.clone())
    torch.testing.assert_close((v - found).abs(), nearest, rtol=0, atol=2e-5)


def test_mxfp4_rounds_to_the_nearest_value() -> None:
    x = torch.linspace(-7.9, 7.9, 32 * 1000).view(-1, 32)
    scales = Scales(torch.ones(1000, 1), None, (torch.full((1000,), 127, dtype=torch.uint8),))
    codec = CODECS["MXFP4"]
    decoded = codec.decode(codec.pack(codec.round(x, scales), scales))
    values = torch.tensor(MXFP4_VALUES).float() / 2
    nearest = (x[:, :, None] - values).abs().amin(2)
    assert torch.equal((x - decoded).abs(), nearest)


def test_mxfp4_bytes_by_hand() -> None:
    x = torch.tensor([0.5, -1, 1.5, 2, 3, -4, 6, 0] * 4)[None]
    data = CODECS["MXFP4"].encode(x, None)[0].tolist()
    assert data == [127] + [c * 17 for c in (1, 10, 3, 4, 5, 14, 7, 0)] * 2


@pytest.mark.parametrize(("others", "exponent"), [(0.5, 127), (1.0, 128)])
def test_mxfp4_takes_the_larger_exponent_where_that_is_better(others: float, exponent: int) -> None:
    """7.9 clips to 6 at exponent 127, but only there 0.5 exists."""
    x = torch.full((1, 32), others)
    x[0, 0] = 7.9
    assert CODECS["MXFP4"].encode(x, None)[0, 0] == exponent


def test_mxfp4_counts_importance() -> None:
    x = torch.full((1, 32), 0.5)
    x[0, 0] = 7.9
    weights = torch.full((1, 32), 0.01)
    weights[0, 0] = 1.0
    assert CODECS["MXFP4"].encode(x, weights)[0, 0] == 128


def test_mxfp4_zeros_and_the_ends_of_the_range() -> None:
    codec = CODECS["MXFP4"]
    assert not codec.encode(torch.zeros(1, 32), None).any()
    for value in (codec.limit, 2.0**-126, 1e-44):
        decoded = codec.decode(codec.encode(torch.full((1, 32), value), None))
        assert decoded.isfinite().all()
        assert abs(decoded[0, 0] - value) <= max(value / 4, 2.0**-128)


def test_iq4_xs_bytes_by_hand() -> None:
    codes = (torch.arange(256) % 16).to(torch.uint8)[None]
    whole = torch.tensor([[-32, -31, -16, -15, 0, 1, 30, 31]], dtype=torch.int8)
    scales = Scales(whole.float(), None, (torch.ones(1), whole))
    data = CODECS["IQ4_XS"].pack(codes, scales)[0].tolist()
    assert data[:2] == [0x00, 0x3C]
    # Plus 32: 0, 1, 16, 17, 32, 33, 62, 63. High two bits 0, 0, 1, 1, 2, 2, 3, 3.
    assert data[2:4] == [0b01010000, 0b11111010]
    assert data[4:8] == [0x10, 0x10, 0x10, 0xFE]
    assert data[8:] == [c * 17 for c in range(16)] * 8
    decoded = CODECS["IQ4_XS"].decode(torch.tensor([data], dtype=torch.uint8))
    expected = whole.float().repeat_interleave(32, 1) * torch.tensor(IQ4_VALUES * 16).float()
    assert torch.equal(decoded, expected)


@pytest.mark.parametrize("qtype", CODECS)
@pytest.mark.parametrize("scale", [1e-41, 1e-30, 1e-9, 1e6, 1e8, 1e30])
def test_extreme_values_stay_finite(qtype: str, scale: float) -> None:
    x = torch.randn(2, BLOCK[qtype], generator=torch.Generator().manual_seed(3)) * scale
    codec = CODECS[qtype]
    for weights in (None, torch.zeros_like(x), torch.rand_like(x)):
        assert codec.decode(codec.encode(x, weights)).isfinite().all()


@pytest.mark.parametrize("qtype", CODECS)
def test_a_block_does_not_depend_on_its_neighbours(qtype: str) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(67, BLOCK[qtype], generator=generator)
    weights = torch.rand(67, BLOCK[qtype], generator=generator)
    codec = CODECS[qtype]
    for w in (None, weights):
        together = codec.encode(x, w)
        alone = [codec.encode(x[i : i + 1], None if w is None else w[i : i + 1]) for i in range(67)]
        assert torch.equal(together, torch.cat(alone))
