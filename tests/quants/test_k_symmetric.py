"""What is special to Q3_K and Q6_K: bytes laid out by hand, and blocks that are hard to fit."""

import pytest
import torch

from moequant.quants.blocks import Scales
from moequant.quants.k_symmetric import CODECS


def stored(d: float, multipliers: list[int]) -> Scales:
    whole = torch.tensor([multipliers], dtype=torch.int8)
    return Scales(d * whole.float(), None, (torch.tensor([d]), whole))


def test_q3_k_bytes_by_hand() -> None:
    """Levels 0..7 again and again, multipliers -32..-17: every field has a known value."""
    levels = (torch.arange(256) % 8).to(torch.uint8)[None]
    data = CODECS["Q3_K"].pack(levels, stored(1.0, list(range(-32, -16))))[0].tolist()
    # Values m, m + 32, ... are all m % 8: the high bit of each is set or none is.
    assert data[:32] == [0, 0, 0, 0, 255, 255, 255, 255] * 4
    assert data[32:96] == [0b01010101 * k for k in (0, 1, 2, 3)] * 16
    # Multiplier g + 32 is g: low nibbles of 0..7 with those of 8..15, no high bits.
    assert data[96:104] == [g | (g + 8) << 4 for g in range(8)]
    assert data[104:108] == [0] * 4
    assert data[108:] == [0x00, 0x3C]  # 1.0 as fp16


def test_q6_k_bytes_by_hand() -> None:
    levels = (torch.arange(256) % 64).to(torch.uint8)[None]
    data = CODECS["Q6_K"].pack(levels, stored(1.0, list(range(-8, 8))))[0].tolist()
    # Byte 0: values 0 and 64; byte 32: values 32 and 96; all have low nibble 0 (m % 16).
    assert data[:128] == [m % 16 * 17 for m in range(32)] * 4
    # High bits of m, m + 32, m + 64, m + 96: m/16, m/16 + 2, and both again.
    high = [m // 16 | (m // 16 + 2) << 2 for m in range(32)]
    assert data[128:192] == [h | h << 4 for h in high] * 2
    assert data[192:208] == [m % 256 for m in range(-8, 8)]
    assert data[208:] == [0x00, 0x3C]


@pytest.mark.parametrize("qtype", ["Q3_K", "Q6_K"])
def test_pack_then_decode_gives_every_level_and_multiplier(qtype: str) -> None:
    top, most = {"Q3_K": (4, 32), "Q6_K": (32, 128)}[qtype]
    generator = torch.Generator().manual_seed(1)
    levels = torch.randint(0, 2 * top, (64, 256), generator=generator, dtype=torch.uint8)
    whole = torch.randint(-most, most, (64, 16), generator=generator, dtype=torch.int8)
    d = torch.full((64,), 0.5)
    codec = CODECS[qtype]
    decoded = codec.decode(codec.pack(levels, Scales(whole * 0.5, None, (d, whole))))
    step = (whole.float() * 0.5).repeat_interleave(16, 1)
    assert torch.equal(decoded, step * (levels.float() - top))


@pytest.mark.parametrize("qtype", ["Q3_K", "Q6_K"])
def test_a_group_without_weight_neither_vanishes_nor_sets_the_scale(qtype: str) -> None:
    """Zero importance means unseen, not unimportant: the group gets a step of its own."""
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(2))
    x[0, :16] *= 4
    weights = torch.ones(1, 256)
    weights[0, :16] = 0
    codec = CODECS[qtype]
    decoded = codec.decode(codec.encode(x, weights))
    off = (decoded - x).abs()
    assert off[0, :16].max() < 4 and decoded[0, :16].any()
    assert off[0, 16:].max() < {"Q3_K": 0.8, "Q6_K": 0.08}[qtype]


@pytest.mark.parametrize("qtype", ["Q3_K", "Q6_K"])
@pytest.mark.parametrize("scale", [1e-41, 1e-30, 1e-9, 1e6, 1e8, 1e30])
def test_extreme_values_stay_finite(qtype: str, scale: float) -> None:
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(3)) * scale
    codec = CODECS[qtype]
    for weights in (None, torch.zeros_like(x), torch.rand_like(x)):
        assert codec.decode(codec.encode(x, weights)).isfinite().all()


@pytest.mark.parametrize("qtype", ["Q3_K", "Q6_K"])
def test_a_block_does_not_depend_on_its_neighbours(qtype: str) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(67, 256, generator=generator)
    weights = torch.rand(67, 256, generator=generator)
    codec = CODECS[qtype]
    for w in (None, weights):
        together = codec.encode(x, w)
        alone = [codec.encode(x[i : i + 1], None if w is None else w[i : i + 1]) for i in range(67)]
        assert torch.equal(together, torch.cat(alone))
