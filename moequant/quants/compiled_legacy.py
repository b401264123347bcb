"""Q8_0, Q4_0, Q5_0, Q4_1 and Q5_1 on the CPU, compiled: 32 values with one scale.

Owns: fit, rounding and packing, one kernel per type; F32, F16 and BF16, which torch converts in one
pass, straight to where they belong. Leaves out: decoding and the alternative in torch (`legacy`),
chunks and threads (`moequant.quants`).

Without weights the scale spans the block, as in ggml: the largest magnitude, or the range, ends on
the last level. Levels are rounded with the scale as fp16 stores it, where ggml rounds with the one
it had before: per value that is never worse. With weights a search takes 16 blocks at a time, one
per lane (see `compiled_symmetric`). Its candidates include the levels of every candidate of ggml's
search; each gets the scale that is best for the weights as given, while ggml's own are multiplied
by sqrt(sigma² + x²).

Source: block_q8_0, block_q4_0, block_q4_1, block_q5_0, block_q5_1 in ggml-common.h; make_qx_quants
and make_qkx3_quants in ggml-quants.c.
"""

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from moequant.quants.compiled import Kernel, jit, safe_inverse, store_half
from moequant.quants.compiled_symmetric import (
    DEPTH,
    LANES,
    LARGEST,
    TILE,
    TINY,
    WX,
    W,
    near_half,
    near_inverse,
    nearest,
    peaks_of,
    step_sums,
    stored_sums,
)

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]

SIZE = 32
TILES = SIZE // DEPTH
ZERO = np.float32(0)
ONE = np.float32(1)
TWO = np.float32(2)
HALF_ULP = np.float32(0.0007)  # relative: adding it and rounding gives the next fp16
VARIANCE_FLOOR = np.float32(1e-9)  # in steps²; below it is one level and rounding noise
NOISE = np.float32(1e-6)  # of the square of the distance of the levels' mean from its place

# Levels where the largest value is tried to lie: ggml's, and some beyond the last one.
STRETCHES = (0.0, -1.0, *(step / 10 for step in range(-9, 10) if step), 1.2, 1.4)
PEAKS_Q4_0 = -np.array([8 + stretch for stretch in STRETCHES], dtype=np.float32)
PEAKS_Q5_0 = -np.array(
    [*(16 + stretch for stretch in STRETCHES), 14.5, 14, 13, 12, 8, -15.4, -15, -14, -13],
    dtype=np.float32,
)
# Steps that the range is tried to span, in levels beyond the last.
SPANS = np.array(
    (0.0, -1.8, -1.4, -1.1, *(step / 20 for step in range(-18, 19) if step), 1.2, 1.5, 2),
    dtype=np.float32,
)
REFINEMENTS = 3
NEIGHBOURS = 8  # of a pair of fp16 numbers


# Blocks to lanes


@jit
def load_blocks(x: Floats, weights: Floats, first: int, blocks: Ints, lanes: Floats) -> None:
    """Up to 16 of the blocks of x, and their weights if there are any, to lanes; zeros after."""
    lanes[:] = ZERO
    for g in range(len(blocks)):
        values = x[blocks[g]]
        for k in range(SIZE):
            lanes[(k // DEPTH) * TILE + (k % DEPTH) * 16 + g] = values[k]
        if len(weights) > 0:
            row = weights[(first + blocks[g]) % len(weights)]
            for k in range(SIZE):
                lanes[W + (k // DEPTH) * TILE + (k % DEPTH) * 16 + g] = row[k]
    for tile in range(TILES):
        part = lanes[tile * TILE : (tile + 1) * TILE]
        if len(weights) == 0:
            part[W:] = ONE
        for j in range(WX):
            part[WX + j] = part[W + j] * part[j]


# Q4_0, Q5_0: value = d * level, levels -half..half - 1


@jit
def fit_signed(lanes: Floats, peaks: Floats, half: np.float32, d: Floats) -> None:
    """fp16 d of each lane: the least true error over all trials, after all rounding.

    First the plain rule, then steps that put the largest value at each of `peaks`, each solved for;
    then the best one solved for again, and its neighbours in fp16.
    """
    sums, inverse = np.empty(48, np.float32), np.empty(16, np.float32)
    best, trial = np.empty(16, np.float32), np.empty(16, np.float32)
    peak, refit = np.empty(16, np.float32), np.empty(16, np.float32)
    best[:] = LARGEST
    peaks_of(lanes, peak)
    for turn in range(len(peaks) + 2 + REFINEMENTS):
        if turn < len(peaks):
            for g in range(LANES):
                inverse[g] = peaks[turn] * near_inverse(peak[g])
            step_sums(lanes, inverse, -half, half - ONE, sums)
        for g in range(LANES):
            solved = sums[g] / max(sums[16 + g], TINY)
            plain = peak[g] / peaks[0]
            trial[g] = near_half(plain if sums[16 + g] <= ZERO else solved)
            if turn >= len(peaks):
                nudge = ONE + HALF_ULP * np.float32((turn - len(peaks)) * 2 - 1)
                trial[g] = near_half(refit[g] if turn >= len(peaks) + 2 else d[g] * nudge)
        stored_sums(lanes, trial, -half, half - ONE, sums)
        for g in range(LANES):
            better = sums[g] < best[g]
            best[g] = sums[g] if better else best[g]
            d[g] = trial[g] if better else d[g]
            again = trial[g] + sums[16 + g] / max(sums[32 + g], TINY)
            refit[g] = again if better else refit[g]


@jit
def one_value(value: np.float32, half: np.float32) -> np.float32:
    """fp16 d of which some level is nearest to the one value of a block."""
    best, least = ZERO, LARGEST
    for level in range(1, int(half) + 1):
        d = near_half(value / -np.float32(level))
        missed = abs(d * -np.float32(level) - value)
        best = d if missed < least else best
        least = min(missed, least)
    return best


@jit
def round_signed(x: Floats, d: np.float32, half: np.float32, levels: Bytes) -> None:
    """Levels 0..2 half - 1."""
    inverse = safe_inverse(d)
    for k in range(SIZE):
        levels[k] = np.uint8(np.int32(nearest(x[k] * inverse, -half, half - ONE) + half))


@jit
def pack_levels(levels: Bytes, five: bool, offset: int, out: Bytes) -> None:
    """High bits [4] if there are five, then low four bits [16], from out[offset] on."""
    if five:
        for byte in range(4):
            bits = 0
            for k in range(8):
                bits |= (levels[8 * byte + k] >> 4) << k
            out[offset + byte] = np.uint8(bits)
        offset += 4
    codes = out[offset : offset + 16]
    for k in range(16):
        codes[k] = np.uint8((levels[k] & 15) | (levels[16 + k] & 15) << 4)


@jit
def range_of(x: Floats) -> tuple[np.float32, np.float32]:
    """Least and largest value of a block."""
    low, high = x[0], x[0]
    for k in range(SIZE):
        low = min(low, x[k])
        high = max(high, x[k])
    return low, high


@jit
def encode_signed(x: Floats, weights: Floats, first: int, five: bool, peaks: Floats,
                  out: Bytes) -> None:  # fmt: skip
    """Q5_0 or Q4_0.

    A block that was quantized before often reaches as far up as down; then one end must give way,
    or the scale: the plain rule is at its worst where the search may lose nothing at all. Such
    blocks are searched without weights, too.
    """
    half = np.float32(16 if five else 8)
    searched, count = np.empty(len(x), np.int64), 0
    levels = np.empty(SIZE, np.uint8)
    for i in range(len(x)):
        low, high = range_of(x[i])
        if low == high:
            d = one_value(high, half)
        elif len(weights) > 0 or high == -low:
            searched[count] = i
            count += 1
            continue
        else:
            d = near_half((high if high > -low else low) / -half)
        round_signed(x[i], d, half, levels)
        store_half(out[i], 0, d)
        pack_levels(levels, five, 2, out[i])
    lanes, ds = np.empty(TILES * TILE, np.float32), np.empty(LANES, np.float32)
    for start in range(0, count, LANES):
        blocks = searched[start : min(start + LANES, count)]
        load_blocks(x, weights, first, blocks, lanes)
        fit_signed(lanes, peaks, half, ds)
        for g in range(len(blocks)):
            round_signed(x[blocks[g]], ds[g], half, levels)
            store_half(out[blocks[g]], 0, ds[g])
            pack_levels(levels, five, 2, out[blocks[g]])


def encode_q4_0(x: Floats, weights: Floats, first: int, out: Bytes) -> None:
    """See `Kernel`."""
    encode_signed(x, weights, first, False, PEAKS_Q4_0, out)


def encode_q5_0(x: Floats, weights: Floats, first: int, out: Bytes) -> None:
    """See `Kernel`."""
    encode_signed(x, weights, first, True, PEAKS_Q5_0, out)


# Q4_1, Q5_1: value = d * level + m, levels 0..top


@jit
def centre(lanes: Floats, mean: Floats, low: Floats, high: Floats) -> None:
    """Weights to shares of 1 per lane, values to distances from their weighted mean [16].

    low and high [16] are the least and largest distance. A lane without weight counts all alike.
    """
    for g in range(LANES):
        total, weighted = ZERO, ZERO
        for tile in range(TILES):
            for k in range(DEPTH):
                total += lanes[tile * TILE + W + k * 16 + g]
                weighted += lanes[tile * TILE + WX + k * 16 + g]
        mean[g] = weighted / total if total > ZERO else ZERO
        low[g], high[g] = LARGEST, -LARGEST
        for tile in range(TILES):
            part = lanes[tile * TILE : (tile + 1) * TILE]
            for k in range(DEPTH):
                share = part[W + k * 16 + g] / total if total > ZERO else ONE / np.float32(SIZE)
                centred = part[k * 16 + g] - mean[g]
                part[k * 16 + g] = centred
                part[WX + k * 16 + g] = share * centred
                part[W + k * 16 + g] = share
                low[g], high[g] = min(low[g], centred), max(high[g], centred)


@jit
def moments(lanes: Floats, inverse: Floats, shift: Floats, top: np.float32, sums: Floats) -> None:
    """Mean, variance and covariance with x, [16] each, of levels nearest to x * inverse + shift.

    The mean is what is added to `shift`: levels are centred on where the mean of x falls, so that
    the sums do not cancel.
    """
    sums[:] = ZERO
    for tile in range(TILES):
        part = lanes[tile * TILE : (tile + 1) * TILE]
        for g in range(LANES):
            mean, square, along, scale, start = ZERO, ZERO, ZERO, inverse[g], shift[g]
            for k in range(DEPTH):
                level = nearest(part[k * 16 + g] * scale + start, ZERO, top) - start
                mean += level * part[W + k * 16 + g]
                square += level * (level * part[W + k * 16 + g])
                along += level * part[WX + k * 16 + g]
            sums[g] += mean
            sums[16 + g] += square
            sums[32 + g] += along
    for g in range(LANES):
        variance = sums[16 + g] - sums[g] * sums[g] * (ONE + NOISE) - VARIANCE_FLOOR
        sums[16 + g] = max(variance, ZERO)


@jit
def line_errors(lanes: Floats, d: Floats, m: Floats, mean: Floats, top: np.float32,
                error: Floats) -> None:  # fmt: skip
    """E [16] of each lane for the levels nearest to (x - m) / d."""
    error[:] = ZERO
    for tile in range(TILES):
        part = lanes[tile * TILE : (tile + 1) * TILE]
        for g in range(LANES):
            step, start, total = d[g], m[g] - mean[g], ZERO
            inverse = near_inverse(step)
            for k in range(DEPTH):
                above = part[k * 16 + g] - start
                missed = above - step * nearest(above * inverse, ZERO, top)
                total += part[W + k * 16 + g] * missed * missed
            error[g] += total


@jit
def solve_line(sums: Floats, shift: Floats, mean: Floats, trial: Floats) -> None:
    """Least squares d [16] and m [16], in fp16, for the moments of levels about `shift`."""
    for g in range(LANES):
        level_mean, variance, along = shift[g] + sums[g], sums[16 + g], sums[32 + g]
        step = max(along / max(variance, TINY), ZERO)
        m = near_half(mean[g] - step * level_mean)
        square = variance + level_mean * level_mean
        d = (along + (mean[g] - m) * level_mean) / max(square, TINY)
        trial[g] = near_half(max(d, ZERO))
        trial[16 + g] = m


@jit
def neighbours(best: Floats, which: int, trial: Floats) -> None:
    """Neighbour `which`, 0..7, in fp16 of each lane's d [16] and m [16]."""
    place = which if which < 4 else which + 1
    for_d = ONE + HALF_ULP * np.float32(place // 3 - 1)
    for_m = ONE + HALF_ULP * np.float32(place % 3 - 1)
    for g in range(LANES):
        trial[g] = near_half(best[g] * for_d)
        trial[16 + g] = near_half(best[16 + g] * for_m)


@jit
def fit_lines(lanes: Floats, spans: Floats, top: np.float32, best: Floats) -> None:
    """d [16], m [16] and E [16] of each lane: the least true error over all trials.

    The first trials spread the range over top + span steps from level 0 up, or from `top` down; the
    next round with the best line so far and solve again; the last take its neighbours.
    """
    count = len(spans)
    sums, trial = np.empty(48, np.float32), np.empty(32, np.float32)
    error, mean = np.empty(16, np.float32), np.empty(16, np.float32)
    low, high = np.empty(16, np.float32), np.empty(16, np.float32)
    inverse, shift = np.empty(16, np.float32), np.empty(16, np.float32)
    best[:32] = ZERO
    best[32:] = LARGEST
    centre(lanes, mean, low, high)
    for turn in range(count + REFINEMENTS + NEIGHBOURS):
        span = spans[min(turn, count - 1)]
        down = span if turn % 2 == 1 and span > ZERO else ZERO
        for g in range(LANES):
            wide = (top + span) / max(high[g] - low[g], TINY)
            again = near_inverse(best[g])
            inverse[g] = wide if turn < count else again
            shift[g] = -low[g] * wide - down if turn < count else (mean[g] - best[16 + g]) * again
        if turn < count + REFINEMENTS:
            moments(lanes, inverse, shift, top, sums)
            solve_line(sums, shift, mean, trial)
        else:
            neighbours(best, turn - count - REFINEMENTS, trial)
        line_errors(lanes, trial[:16], trial[16:], mean, top, error)
        for g in range(LANES):
            better = error[g] < best[32 + g]
            best[32 + g] = error[g] if better else best[32 + g]
            best[g] = trial[g] if better else best[g]
            best[16 + g] = trial[16 + g] if better else best[16 + g]


@jit
def one_line(value: np.float32) -> tuple[np.float32, np.float32]:
    """d and m of a block of one value: an fp16 at or below it, what is missing as one step."""
    below = near_half(value)
    if below > value:
        below = near_half(below - HALF_ULP * abs(below))
    return near_half(value - below), below


@jit
def write_line(x: Floats, d: np.float32, m: np.float32, five: bool, levels: Bytes,
               out: Bytes) -> None:  # fmt: skip
    """Round a block and pack it."""
    inverse, top = safe_inverse(d), np.float32(31 if five else 15)
    for k in range(SIZE):
        levels[k] = np.uint8(np.int32(nearest((x[k] - m) * inverse, ZERO, top)))
    store_half(out, 0, d)
    store_half(out, 2, m)
    pack_levels(levels, five, 4, out)


@jit
def encode_lines(x: Floats, weights: Floats, first: int, five: bool, spans: Floats,
                 out: Bytes) -> None:  # fmt: skip
    """Q5_1 or Q4_1: the plain rule without weights, else the search."""
    top, levels = np.float32(31 if five else 15), np.empty(SIZE, np.uint8)
    searched, count = np.empty(len(x), np.int64), 0
    for i in range(len(x)):
        low, high = range_of(x[i])
        if low == high:
            d, m = one_line(low)
        elif len(weights) > 0:
            searched[count] = i
            count += 1
            continue
        else:
            d, m = near_half((high - low) / top), near_half(low)
        write_line(x[i], d, m, five, levels, out[i])
    lanes, best = np.empty(TILES * TILE, np.float32), np.empty(48, np.float32)
    for start in range(0, count, LANES):
        blocks = searched[start : min(start + LANES, count)]
        load_blocks(x, weights, first, blocks, lanes)
        fit_lines(lanes, spans, top, best)
        for g in range(len(blocks)):
            i = blocks[g]
            write_line(x[i], best[g], best[16 + g], five, levels, out[i])


def encode_q4_1(x: Floats, weights: Floats, first: int, out: Bytes) -> None:
    """See `Kernel`."""
    encode_lines(x, weights, first, False, SPANS, out)


def encode_q5_1(x: Floats, weights: Floats, first: int, out: Bytes) -> None:
    """See `Kernel`."""
    encode_lines(x, weights, first, True, SPANS, out)


# Q8_0: as ggml does, without regard to weights


@jit
def encode_q8_0_blocks(x: Floats, out: Bytes) -> None:
    """Largest magnitude at level 127."""
    top = np.float32(127)
    for i in range(len(x)):
        low, high = range_of(x[i])
        d = near_half(max(high, -low) / top)
        inverse = safe_inverse(d)
        store_half(out[i], 0, d)
        values, codes = x[i], out[i, 2:]
        for k in range(SIZE):
            codes[k] = np.uint8(np.int32(nearest(values[k] * inverse, -top, top)))


def encode_q8_0(x: Floats, _weights: Floats, _first: int, out: Bytes) -> None:
    """See `Kernel`."""
    encode_q8_0_blocks(x, out)


# F32, F16, BF16: conversions, not searches


def _convert(dtype: torch.dtype, x: Floats, _weights: Floats, _first: int, out: Bytes) -> None:
    """See `Kernel`; blocks of one value."""
    torch.from_numpy(out).view(dtype).copy_(torch.from_numpy(x))


KERNELS: dict[str, Kernel] = {
    "F32": partial(_convert, torch.float32),
    "F16": partial(_convert, torch.float16),
    "BF16": partial(_convert, torch.bfloat16),
    "Q8_0": encode_q8_0,
    "Q4_0": encode_q4_0,
    "Q5_0": encode_q5_0,
    "Q4_1": encode_q4_1,
    "Q5_1": encode_q5_1,
}
