"""F32, F16, BF16, and the types of 32 values with one scale: Q8_0, Q4_0, Q5_0, Q4_1, Q5_1.

Owns: their fits and bytes. Leaves out: the search of Q4_1 and Q5_1 (`search`).

Without weights the scale spans the block, as in ggml: the largest magnitude, or the range, ends
on the last level. Levels are rounded with the scale as fp16 stores it, where ggml rounds with the
one it had before; that never costs, and saves a little. Q8_0 ignores weights, as ggml does.

Source of the layouts: block_q8_0, block_q4_0, block_q4_1, block_q5_0, block_q5_1 in ggml.
"""

from functools import partial

import torch
from torch import Tensor

from moequant.quants.blocks import (
    FP16_MAX,
    Codec,
    Scales,
    as_columns,
    column_sum,
    column_sum_,
    first_largest,
    fp16_field,
    pack_bits,
    read_fp16,
    round_affine,
    safe_inverse,
    scratch,
    through_fp16,
    to_bytes,
    unpack_bits,
)
from moequant.quants.search import Limits, Line, columns_of, explained_by, fit_lines, step_for

BF16_MAX = torch.finfo(torch.bfloat16).max
F32_MAX = torch.finfo(torch.float32).max
REFINEMENTS = 3
# Spans to try, in levels beyond the plain one: ggml's, and a few where it has none.
SIGNED_STRETCHES = (-1.4, -1.2, -1.0, *(step / 10 for step in range(-9, 10)))
OFFSET_STRETCHES = (0.0, -1.8, -1.4, -1.1, *(step / 20 for step in range(-18, 19) if step))
HALF_ULP = 0.0007  # relative: adding it and rounding gives the next fp16


# F32, F16, BF16: no scales; the levels are the values.


def _no_scales(x: Tensor, _: Tensor | None) -> Scales:
    return Scales(torch.ones_like(x[:, :1]), None, ())


def _float_codec(dtype: torch.dtype, limit: float) -> Codec:
    def unrounded(x: Tensor, _: Scales) -> Tensor:
        return x

    def pack(levels: Tensor, _: Scales) -> Tensor:
        return levels.to(dtype).contiguous().view(torch.uint8)

    def decode(data: Tensor) -> Tensor:
        return data.contiguous().view(dtype).float()

    return Codec(_no_scales, unrounded, pack, decode, limit, weighted=False)


# Q8_0, Q4_0, Q5_0: value = d·(level − half).


def _signed_scales(d: Tensor, half: int) -> Scales:
    step = through_fp16(d).unsqueeze(1)
    return Scales(step, step * -half, (step,))


def _fit_q8_0(x: Tensor, _: Tensor | None) -> Scales:
    largest = torch.maximum(x.amax(1), -x.amin(1))
    return _signed_scales(largest / 127, 127)


def _fit_signed(half: int, x: Tensor, weights: Tensor | None) -> Scales:
    high, low = x.amax(1), x.amin(1)
    d = torch.where(high > -low, high, low) / -half
    if weights is not None:
        d = torch.where(high > low, _searched_signed(half, x, weights, d), _one_value(half, high))
        return _signed_scales(d, half)
    # A block that was quantized before often reaches as far up as down; then one end must give
    # way, or the scale: the plain rule is at its worst where the search may lose nothing at all.
    mirrored = torch.nonzero((high == -low) & (high > 0))[:, 0]
    if len(mirrored):
        again = x[mirrored]
        d[mirrored] = _searched_signed(half, again, torch.ones_like(again), d[mirrored])
    return _signed_scales(d, half)


def _one_value(half: int, value: Tensor) -> Tensor:
    """fp16 d [n] of which some level is nearest to the one value of a block."""
    levels = torch.arange(-half, 0, device=value.device).unsqueeze(1)
    d = through_fp16(value / levels)
    return d.gather(0, (d * levels - value).abs().argmin(0, keepdim=True))[0]


def _searched_signed(half: int, x: Tensor, weights: Tensor, d: Tensor) -> Tensor:
    """The best fp16 d [n] over spans around the given one, refitted and refined."""
    columns, weights = as_columns(x, x.shape[1], "x"), as_columns(weights, x.shape[1], "w")
    total = column_sum(weights)
    weights *= safe_inverse(total)
    weights.masked_fill_(total == 0, 1.0 / x.shape[1])
    weighted = torch.mul(weights, columns, out=scratch("weighted", x, *columns.shape))
    inverse = safe_inverse(d)
    best, explained = through_fp16(d), torch.full_like(d, -torch.inf)
    for turn in range(len(SIGNED_STRETCHES) + REFINEMENTS):
        if turn < len(SIGNED_STRETCHES):
            trial = inverse * (1 + SIGNED_STRETCHES[turn] / half)
        else:
            trial = safe_inverse(best)
        refit, gain = _refit_signed(columns, weights, weighted, trial, half)
        better = gain > explained
        best = torch.where(better, refit, best)
        explained = torch.where(better, gain, explained)
    return best


def _refit_signed(
    columns: Tensor, weights: Tensor, weighted: Tensor, inverse: Tensor, half: int
) -> tuple[Tensor, Tensor]:
    """Least squares fp16 d for the levels under `inverse`, the error it takes off: [n] each."""
    size, n = columns.shape
    levels = torch.mul(columns, inverse, out=scratch("levels", columns, size, n))
    levels.round_().clamp_(-half, half - 1)
    products = scratch("products", columns, size, 2, n)
    torch.mul(levels, weighted, out=products[:, 0])
    torch.mul(levels, weights, out=products[:, 1])
    products[:, 1].mul_(levels)
    along, square = column_sum_(products)
    d = through_fp16(along * safe_inverse(square))
    return d, d * (2 * along - d * square)


def _decoded_signed(field: Tensor, levels: Tensor, half: int) -> Tensor:
    return read_fp16(field) * (levels.float() - half)


# Q4_1, Q5_1: value = d·level + m.


def _fit_offset(top: int, x: Tensor, weights: Tensor | None) -> Scales:
    low, high = x.amin(1), x.amax(1)
    if weights is None:
        d, m = through_fp16((high - low) / top), through_fp16(low)
    else:
        columns = columns_of(as_columns(x, x.shape[1], "x"), as_columns(weights, x.shape[1], "w"))
        limits = Limits(top, nonpositive=False, fp16=True)
        line = fit_lines(columns, limits, OFFSET_STRETCHES, REFINEMENTS)
        d, m = _polished(line, columns.mean)
    # One value: an fp16 at or below it, and what is missing as one step.
    below = through_fp16(low)
    below = torch.where(below > low, through_fp16(below - HALF_ULP * below.abs()), below)
    flat = high == low
    d = torch.where(flat, through_fp16(low - below), d).unsqueeze(1)
    m = torch.where(flat, below, m).unsqueeze(1)
    return Scales(d, m, (d, m))


def _polished(line: Line, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Step and offset [n] exchanged for neighbours in fp16 where those explain more."""
    ulps = torch.tensor((0.0, HALF_ULP, -HALF_ULP), device=mean.device).view(3, 1, 1)
    found = line.table[:3].unsqueeze(1)
    offsets = through_fp16(line.offset * (1 + ulps.squeeze(1)))
    steps = through_fp16(step_for(found, mean, offsets) * (1 + ulps)).flatten(0, 1)
    offsets = offsets.repeat(3, 1)
    explained = explained_by(found, mean, steps, offsets)
    choice = first_largest(explained).unsqueeze(0)
    return steps.gather(0, choice)[0], offsets.gather(0, choice)[0]


# Bytes.


def _fields(scales: Scales) -> list[Tensor]:
    return [fp16_field(field).flatten(1) for field in scales.stored]


def _nibbles(levels: Tensor) -> Tensor:
    """Levels 0..15 [n, 32] to uint8 [n, 16]: the first half low, the second high."""
    return to_bytes(levels[:, :16] + 16 * levels[:, 16:])


def _pack_q8_0(levels: Tensor, scales: Scales) -> Tensor:
    signed = (levels - 127).to(torch.int8).view(torch.uint8)
    return torch.cat((*_fields(scales), signed), 1)


def _pack_4bit(levels: Tensor, scales: Scales) -> Tensor:
    return torch.cat((*_fields(scales), _nibbles(levels)), 1)


def _pack_5bit(levels: Tensor, scales: Scales) -> Tensor:
    high = levels > 15
    return torch.cat((*_fields(scales), pack_bits(high), _nibbles(levels - 16 * high.float())), 1)


def _read_nibbles(packed: Tensor) -> Tensor:
    return torch.cat((packed & 15, packed >> 4), 1)


def _read_5bit(high: Tensor, packed: Tensor) -> Tensor:
    return _read_nibbles(packed) + 16 * unpack_bits(high)


def _decode_q8_0(data: Tensor) -> Tensor:
    return read_fp16(data[:, :2]) * data[:, 2:].view(torch.int8).float()


def _decode_q4_0(data: Tensor) -> Tensor:
    return _decoded_signed(data[:, :2], _read_nibbles(data[:, 2:]), 8)


def _decode_q5_0(data: Tensor) -> Tensor:
    return _decoded_signed(data[:, :2], _read_5bit(data[:, 2:6], data[:, 6:]), 16)


def _decode_q4_1(data: Tensor) -> Tensor:
    return read_fp16(data[:, :2]) * _read_nibbles(data[:, 4:]) + read_fp16(data[:, 2:4])


def _decode_q5_1(data: Tensor) -> Tensor:
    levels = _read_5bit(data[:, 4:8], data[:, 8:])
    return read_fp16(data[:, :2]) * levels + read_fp16(data[:, 2:4])


CODECS: dict[str, Codec] = {
    "F32": _float_codec(torch.float32, F32_MAX),
    "F16": _float_codec(torch.float16, FP16_MAX),
    "BF16": _float_codec(torch.bfloat16, BF16_MAX),
    "Q8_0": Codec(
        _fit_q8_0,
        partial(round_affine, top=254),
        _pack_q8_0,
        _decode_q8_0,
        127 * FP16_MAX,
        weighted=False,
    ),
    "Q4_0": Codec(
        partial(_fit_signed, 8),
        partial(round_affine, top=15),
        _pack_4bit,
        _decode_q4_0,
        8 * FP16_MAX,
    ),
    "Q5_0": Codec(
        partial(_fit_signed, 16),
        partial(round_affine, top=31),
        _pack_5bit,
        _decode_q5_0,
        16 * FP16_MAX,
    ),
    "Q4_1": Codec(
        partial(_fit_offset, 15),
        partial(round_affine, top=15),
        _pack_4bit,
        _decode_q4_1,
        FP16_MAX,
    ),
    "Q5_1": Codec(
        partial(_fit_offset, 31),
        partial(round_affine, top=31),
        _pack_5bit,
        _decode_q5_1,
        FP16_MAX,
    ),
}
