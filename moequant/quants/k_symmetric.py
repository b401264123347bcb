"""Q3_K and Q6_K: superblocks of 256 values in 16 groups, value = d * multiplier * level.

Owns: both layouts, their fit, rounding, packing and decoding. Leaves out: the search for steps
(`symmetric_search`), K-quants with an offset (`k_asymmetric`).

Q3_K, 110 bytes: high bits of the levels [32], low two bits [64], multipliers of 6 bits [12], d.
Q6_K, 210 bytes: low four bits [128], high two bits [64], multipliers int8 [16], d.

Source: block_q3_K, block_q6_K in ggml-common.h; dequantize_row_q3_K, dequantize_row_q6_K,
quantize_row_q3_K_impl, quantize_row_q6_K_impl in ggml-quants.c.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moequant.quants.blocks import FP16_MAX, Codec, Scales, fp16_field, read_fp16, safe_inverse
from moequant.quants.symmetric_search import Groups, best_steps, refine, split_steps

SUPERBLOCK = 256
GROUPS = 16
SIZE = 16


@dataclass(frozen=True)
class Search:
    """How hard to look, see `symmetric_search`.

    `peaks`: levels where a group's largest value is tried to lie. `multipliers`: where the largest
    step is tried to lie. `offsets`: which neighbours of a multiplier are tried.
    """

    peaks: tuple[float, ...]
    multipliers: tuple[float, ...]
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class _Symmetric:
    """A type whose levels are -top..top-1 and whose multipliers are -most..most-1."""

    top: int
    most: int
    plain: Search
    weighted: Search

    def nearest(self, scaled: Tensor) -> Tensor:
        return scaled.round_().clamp_(-self.top, self.top - 1)

    def fit(self, x: Tensor, weights: Tensor | None) -> Scales:
        search = self.plain if weights is None else self.weighted
        groups = Groups(x, weights, GROUPS, self.nearest)
        low, high = -self.most, self.most - 1
        step, curvature = best_steps(groups, search.peaks)
        d, multiplier = split_steps(step, curvature, low, high, search.multipliers)
        d, multiplier = refine(groups, d, multiplier, low, high, search.offsets)
        return Scales((d * multiplier).t(), None, (d, multiplier.t().to(torch.int8)))

    def round(self, x: Tensor, scales: Scales) -> Tensor:
        inverse = safe_inverse(scales.step)[:, :, None]
        levels = self.nearest(x.view(-1, GROUPS, SIZE) * inverse).add_(self.top)
        return levels.to(torch.int8).view(torch.uint8).view(-1, SUPERBLOCK)


def _pack_q3_k(levels: Tensor, scales: Scales) -> Tensor:
    """Bit 2 of value 32b + m is bit b of mask byte m; bits 0-1 of 128h + 32k + m are at 2k."""
    d, multiplier = scales.stored
    high = _merge((levels >> 2).view(-1, 8, 32), 1)
    low = _merge((levels & 3).view(-1, 2, 4, 32), 2)
    six = (multiplier + 32).view(torch.uint8)
    nibbles = _merge((six & 15).view(-1, 2, 8), 4)
    tops = _merge((six >> 4).view(-1, 4, 4), 2)
    return torch.cat((high, low.view(-1, 64), nibbles, tops, fp16_field(d)), 1)


def _decode_q3_k(data: Tensor) -> Tensor:
    high, low, nibbles, tops, d = data.split((32, 64, 8, 4, 2), 1)
    levels = _part(low.reshape(-1, 2, 32), 4, 2).view(-1, SUPERBLOCK)
    levels = levels | (_part(high, 8, 1).view(-1, SUPERBLOCK) << 2)
    six = _part(nibbles, 2, 4).view(-1, GROUPS) | (_part(tops, 4, 2).view(-1, GROUPS) << 4)
    return _values(d, six.float().sub_(32), levels.float().sub_(4))


def _pack_q6_k(levels: Tensor, scales: Scales) -> Tensor:
    """Value 128h + 32k + m: low bits in byte 64h + 32(k%2) + m, high bits at 2k of 32h + m."""
    d, multiplier = scales.stored
    low = _merge((levels & 15).view(-1, 2, 2, 64), 4)
    high = _merge((levels >> 4).view(-1, 2, 4, 32), 2)
    return torch.cat((low.view(-1, 128), high.view(-1, 64), multiplier.view(torch.uint8),
                      fp16_field(d)), 1)  # fmt: skip


def _decode_q6_k(data: Tensor) -> Tensor:
    low, high, multiplier, d = data.split((128, 64, 16, 2), 1)
    levels = _part(low.reshape(-1, 2, 64), 2, 4).view(-1, SUPERBLOCK)
    levels = levels | (_part(high.reshape(-1, 2, 32), 4, 2).view(-1, SUPERBLOCK) << 4)
    signed = multiplier.contiguous().view(torch.int8)
    return _values(d, signed.float(), levels.float().sub_(32))


def _values(d: Tensor, multiplier: Tensor, levels: Tensor) -> Tensor:
    """(d * multiplier) * level in this order: the first product is exact, the second rounds."""
    step = read_fp16(d) * multiplier
    return (levels.view(-1, GROUPS, SIZE) * step[:, :, None]).view(-1, SUPERBLOCK)


def _merge(parts: Tensor, bits: int) -> Tensor:
    """uint8 [..., count, m] to [..., m]: part k shifted left by k * bits."""
    merged = parts[..., 0, :].clone()
    for k in range(1, parts.shape[-2]):
        merged.add_(parts[..., k, :], alpha=1 << (k * bits))
    return merged


def _part(merged: Tensor, count: int, bits: int) -> Tensor:
    """Inverse of `_merge`: uint8 [..., m] to [..., count, m]."""
    mask = (1 << bits) - 1
    return torch.stack([(merged >> (k * bits)) & mask for k in range(count)], -2)


# Peaks past the last level are clipped: right where the largest value has little weight. The dense
# part serves blocks of one sign and nearly one size, whose error has many local minima.
_Q3_K = _Symmetric(
    top=4,
    most=32,
    plain=Search((-4.4, -3.7, 3.9), (-32,), (0, -1)),
    weighted=Search(
        (-4.9, -4.4, -4.2, -4.0, -3.8, -3.6, -3.0, 4.4, 3.9, 3.6, 3.4, 3.2, 3.0, 2.5),
        tuple(range(-32, -23)),
        (0, -1, 1),
    ),
)
_PEAKS_Q6_K = (-32, -31.4, -30.8, -30.2, -29.6, -29)
_Q6_K = _Symmetric(
    top=32,
    most=128,
    plain=Search(_PEAKS_Q6_K, (-128, -127), (0, -1, 1)),
    weighted=Search((*_PEAKS_Q6_K, -33.4), (-128, -127), (0, -1, 1)),
)

# Limits: the largest multiplier and level that exist with both signs.
CODECS: dict[str, Codec] = {
    "Q3_K": Codec(_Q3_K.fit, _Q3_K.round, _pack_q3_k, _decode_q3_k, limit=FP16_MAX * 31 * 3),
    "Q6_K": Codec(_Q6_K.fit, _Q6_K.round, _pack_q6_k, _decode_q6_k, limit=FP16_MAX * 127 * 31),
}
