"""IQ4_NL, IQ4_XS and MXFP4: four-bit codes that stand for the entries of a fixed codebook.

Owns: the two codebooks, layouts, fit, rounding, packing and decoding. Leaves out: the search for
steps of IQ4_NL and IQ4_XS (`symmetric_search`); evenly spaced levels (the other families).

IQ4_NL, 18 bytes for 32 values: d, codes [16]. IQ4_XS, 136 bytes for 256 values in 8 groups: d,
high two bits of the multipliers [2], low four bits [4], codes [128]. MXFP4, 17 bytes for 32
values: exponent, codes [16]. Byte m of the codes of 32 values holds values m (low) and 16 + m.

Source: block_iq4_nl, block_iq4_xs, block_mxfp4, kvalues_iq4nl, kvalues_fp4 in ggml-common.h;
dequantize_row_*, quantize_row_iq4_nl_impl, quantize_row_mxfp4_ref in ggml-quants.c;
ggml_e8m0_to_fp32_half in ggml-impl.h.
"""

from functools import lru_cache

import torch
from torch import Tensor

from moequant.quants.blocks import (
    FP16_MAX,
    Codec,
    Scales,
    fp16_field,
    read_fp16,
    safe_inverse,
)
from moequant.quants.symmetric_search import (
    Groups,
    best_steps,
    best_stored_steps,
    refine,
    split_steps,
)

SUPERBLOCK = 256
SIZE = 32

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)

# Levels where the largest value of a group is tried to lie. Both signs: the codebook is lopsided.
# They are densest at the ends, for blocks of one sign and nearly one size.
_PEAKS_NL = (
    *range(-134, -106, 2), -104, -99, -94,
    *range(126, 104, -2), 102, 97, 92,
)  # fmt: skip
_PEAKS_XS = (*range(-134, -94, 4), *range(128, 90, -4))
_MULTIPLIERS = (-32, -31, -30, -29, -28)
_OFFSETS = (0, -1, 1)

MXFP4_LARGEST = 252  # exponent: 6 * 2^(252 - 127) is still finite
CUT = 1.5 * 2.0**13  # adding and subtracting it rounds to multiples of 2^-10
MARGIN = 2.0**-5  # more than 32 such roundings can be off: what is chosen is truly no worse


# IQ4_NL and IQ4_XS


@lru_cache(maxsize=8)
def _iq4_table(device: torch.device) -> Tensor:
    """Code of the nearest value for each half unit v, 2v = -254..226: int8 [481].

    The midpoints between neighbouring values are multiples of a half, so that a table over halves
    is exact, but for the side on which a tie falls.
    """
    values = torch.tensor(IQ4_VALUES, dtype=torch.float32)
    halves = torch.arange(-254, 227).float().div_(2).add_(0.25)  # middle of each half unit
    codes = torch.bucketize(halves, (values[1:] + values[:-1]) / 2)
    return codes.to(torch.int8).to(device)


@lru_cache(maxsize=8)
def _iq4_values(device: torch.device) -> Tensor:
    return torch.tensor(IQ4_VALUES, dtype=torch.float32, device=device)


@lru_cache(maxsize=8)
def _iq4_value_table(device: torch.device) -> Tensor:
    return _iq4_values(device)[_iq4_table(device).long()]


def _iq4_index(scaled: Tensor) -> Tensor:
    """Position in the tables of x/step; overwrites its argument."""
    return scaled.mul_(2).clamp_(-254, 226).add_(254).to(torch.int32).view(-1)


def _iq4_nearest(scaled: Tensor) -> Tensor:
    table = _iq4_value_table(scaled.device)
    return table.index_select(0, _iq4_index(scaled)).view(scaled.shape)


def _iq4_codes(x: Tensor, scales: Scales) -> Tensor:
    scaled = x.view(len(x), -1, SIZE) * safe_inverse(scales.step)[:, :, None]
    codes = _iq4_table(x.device).index_select(0, _iq4_index(scaled))
    return codes.view(torch.uint8).view(x.shape)


def _fit_iq4_nl(x: Tensor, weights: Tensor | None) -> Scales:
    step = best_stored_steps(Groups(x, weights, 1, _iq4_nearest), _PEAKS_NL, 4).t()
    return Scales(step, None, (step,))


def _pack_iq4_nl(codes: Tensor, scales: Scales) -> Tensor:
    return torch.cat((fp16_field(scales.stored[0][:, 0]), _pack_codes(codes)), 1)


def _decode_iq4_nl(data: Tensor) -> Tensor:
    return _iq4_values_of(data[:, 2:]) * read_fp16(data[:, :2])


def _fit_iq4_xs(x: Tensor, weights: Tensor | None) -> Scales:
    groups = Groups(x, weights, SUPERBLOCK // SIZE, _iq4_nearest)
    step, curvature = best_steps(groups, _PEAKS_XS)
    d, multiplier = split_steps(step, curvature, -32, 31, _MULTIPLIERS)
    d, multiplier = refine(groups, d, multiplier, -32, 31, _OFFSETS)
    return Scales((d * multiplier).t(), None, (d, multiplier.t().to(torch.int8)))


def _pack_iq4_xs(codes: Tensor, scales: Scales) -> Tensor:
    """Group g: low bits of its multiplier + 32 in byte g/2, high bits at 2g of a 16-bit field."""
    d, multiplier = scales.stored
    six = (multiplier + 32).view(torch.uint8)
    high, low = (six >> 4).view(-1, 2, 4), (six & 15).view(-1, 4, 2)
    fields = high[..., 0] | high[..., 1] << 2 | high[..., 2] << 4 | high[..., 3] << 6
    return torch.cat((fp16_field(d), fields, low[..., 0] | low[..., 1] << 4, _pack_codes(codes)), 1)


def _decode_iq4_xs(data: Tensor) -> Tensor:
    d, high, low, codes = data.split((2, 2, 4, 128), 1)
    lows = torch.stack((low & 15, low >> 4), 2).view(-1, 8)
    highs = torch.stack([(high >> bits) & 3 for bits in (0, 2, 4, 6)], 2).view(-1, 8)
    step = read_fp16(d) * (lows | highs << 4).float().sub_(32)
    values = _iq4_values_of(codes).view(-1, SUPERBLOCK // SIZE, SIZE) * step[:, :, None]
    return values.view(-1, SUPERBLOCK)


def _iq4_values_of(codes: Tensor) -> Tensor:
    return _lookup(_iq4_values(codes.device), codes)


# MXFP4


def _fit_mxfp4(x: Tensor, weights: Tensor | None) -> Scales:
    """The better of ggml's exponent, which follows from the largest value, and the next larger.

    With v = |x| in units of ggml's exponent, 4 <= max v < 8. Codes stop at 6.
    """
    v = x.abs()
    largest = v.amax(1)
    _, exponent = torch.frexp(largest)
    exponent = ((exponent + 124) * (largest > 0)).clamp_(0, MXFP4_LARGEST)
    v *= _power(254 - exponent)[:, None]
    exponent += _coarser_saves(v, weights) > MARGIN
    exponent.clamp_(max=MXFP4_LARGEST)
    return Scales(_power(exponent)[:, None], None, (exponent.to(torch.uint8),))


def _coarser_saves(v: Tensor, weights: Tensor | None) -> Tensor:
    """How much less weighted error the next larger exponent gives, float32 [n], where v < 8.

    Per value that is 4 (v-7)+ for what the finer grid clips, less (0.25 - t)+ for the steps 0.5
    and 1.5 that the coarser lacks, t being the distance from them: both grids are the same from 2
    to 6. The terms are cut to multiples of 2^-10. Their sum is then exact in float32, thus the
    same in any order, and `sum` may be used.
    """
    saved = (v - 1).abs_().sub_(0.5).abs_().clamp_(max=0.25)
    saved.add_(v.clamp_(min=7), alpha=4)
    if weights is None:
        saved.add_(CUT - 28.25)
    else:
        saved.sub_(28.25).mul_(weights).add_(CUT)
    return saved.sub_(CUT).sum(1)


def _round_mxfp4(x: Tensor, scales: Scales) -> Tensor:
    """Codes by magnitude m: 2m up to 2, m + 2 up to 4, m/2 + 4 beyond; bit 3 is the sign."""
    m = (x * (1 / scales.step)).abs_()
    # Half a code more than that, for the cut to int8 rounds down.
    low = torch.add(_scalar(0.5, x), m, alpha=2)
    high = torch.add(_scalar(4.5, x), m, alpha=0.5).clamp_(max=7.5)
    code = torch.minimum(low, torch.minimum(m.add_(2.5), high, out=high), out=low).to(torch.int8)
    sign = (x.view(torch.int32) >> 28).to(torch.int8).bitwise_and_(8)
    return code.bitwise_or_(sign).view(torch.uint8)


def _scalar(value: float, like: Tensor) -> Tensor:
    return torch.tensor(value, dtype=like.dtype, device=like.device)


def _pack_mxfp4(codes: Tensor, scales: Scales) -> Tensor:
    return torch.cat((scales.stored[0][:, None], _pack_codes(codes)), 1)


def _decode_mxfp4(data: Tensor) -> Tensor:
    values = torch.tensor(MXFP4_VALUES, dtype=torch.float32, device=data.device)
    return _lookup(values, data[:, 1:]) * _half_power(data[:, :1])


def _power(exponent: Tensor) -> Tensor:
    """2^(exponent - 127) for int32 0..254: float32, for 0 the subnormal 2^-127."""
    return torch.where(exponent > 0, exponent << 23, 1 << 22).to(torch.int32).view(torch.float32)


def _half_power(exponent: Tensor) -> Tensor:
    """2^(exponent - 128) for uint8: the codebook holds twice the format's values."""
    return _power(exponent.int()) * 0.5


# Codes


def _pack_codes(codes: Tensor) -> Tensor:
    """uint8 [n, 32 k] to [n, 16 k]: the first 16 of each 32 are low nibbles."""
    halves = codes.view(len(codes), -1, 2, 16)
    return torch.add(halves[:, :, 0], halves[:, :, 1], alpha=16).view(len(codes), -1)


def _lookup(values: Tensor, packed: Tensor) -> Tensor:
    """Inverse of `_pack_codes`, and then each code's value: float32 [n, 32 k]."""
    packed = packed.reshape(len(packed), -1, 1, 16)
    codes = torch.cat((packed & 15, packed >> 4), 2).view(-1)
    return values.index_select(0, codes.to(torch.int32)).view(len(packed), -1)


CODECS: dict[str, Codec] = {
    "IQ4_NL": Codec(_fit_iq4_nl, _iq4_codes, _pack_iq4_nl, _decode_iq4_nl, limit=FP16_MAX * 113),
    "IQ4_XS": Codec(
        _fit_iq4_xs, _iq4_codes, _pack_iq4_xs, _decode_iq4_xs, limit=FP16_MAX * 31 * 113
    ),
    "MXFP4": Codec(_fit_mxfp4, _round_mxfp4, _pack_mxfp4, _decode_mxfp4, limit=6 * 2.0**125),
}
