"""Q3_K, Q6_K and MXFP4 on the CPU, compiled; and the search for steps that Q4_0 and Q5_0 share.

Owns: fit, rounding and packing of a block, one kernel per type. Leaves out: decoding and the CPU's
alternative in torch (`k_symmetric`, `nonlinear`), chunks and threads (`moequant.quants`).

What is minimised is E = Σ w (s l - x)². With levels l rounded from a trial step, A = Σ w x l and
B = Σ w l² give the best step A/B and its gain A²/B. For a step as stored, E is summed as it stands,
since the difference of large sums says nothing where the fit is good.

Sums go over 16 lanes at a time: value k of lane g is at [16 k + g] of its tile, and a lane is a
group of 16 values of one superblock, or a block of 32 values. Each lane adds its own values in a
fixed order, so that vector registers change no bit, and no lane knows which others came along.

Source: block_q3_K, block_q6_K, block_mxfp4 in ggml-common.h; quantize_row_q3_K_impl,
quantize_row_q6_K_impl, make_qx_quants, quantize_row_mxfp4_ref in ggml-quants.c.
"""

import numpy as np
from numpy.typing import NDArray

from moequant.quants.compiled import Kernel, clamp, inlined, jit, safe_inverse, store_half

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

LANES = 16
# A tile holds DEPTH values of each lane: x [128], w x [128], w [128]. Sums loop over tiles, and the
# loops inside a tile are unrolled. One array, not three: the compiler gives up on more pointers.
DEPTH = 8
WX, W, TILE = 128, 256, 384
SUPERBLOCK = 256

ZERO = np.float32(0)
ONE = np.float32(1)
HALF = np.float32(0.5)
TWO = np.float32(2)
LARGEST = np.float32(3.4e38)
TINY = np.float32(1e-30)
# Gains that differ by rounding only are ties, and the first trial keeps them: groups of a constant
# row then agree on a step, and one d serves them all.
MARGIN = np.float32(1 + 1e-6)
ROUNDER = np.float32(1.5 * 2.0**23)  # adding and subtracting it rounds to even, up to 2^22
FP16_MAX = np.float32(65504)
FP16_NORMAL = np.float32(2.0**-14)
CUT_TO_11_BITS = np.float32(2.0**13 + 1)

# Levels where a group's largest value is tried to lie; past the last level it is clipped, right
# where it has little weight. The dense part serves groups of one sign and nearly one size.
PEAKS_Q3_K = np.array(
    (-4.0, -4.9, -4.4, -4.2, -3.8, -3.6, -3.4, -3.0, 4.4, 3.9, 3.6, 3.4, 3.2, 3.0, 2.5),
    dtype=np.float32,
)
PEAKS_Q3_K_PLAIN = np.array((-4.0, -4.5, -3.6, 4.1, 3.5, -3.2), dtype=np.float32)
PEAKS_Q6_K = np.array(
    (-32, -32.6, -31.6, -31.2, -30.8, -30.4, -30, -29.6, -29.2, 32.2, 31.4, 31, 30.6, 30.2, 29.8,
     29.4, 29, 28.6),
    dtype=np.float32,
)  # fmt: skip
# Multipliers where the largest step of a superblock is tried to lie: all of them where one group
# has most of the weight, and luck with few values decides; else the first FEW of them.
TARGETS_Q3_K = np.array((-32, -30, -28, -31, -29, -27, -26, -25, 31, 30, 29), dtype=np.float32)
FEW_Q3_K, FEW_Q3_K_PLAIN, FEW_Q6_K = 3, 1, 2
MOST = np.float32(0.25)  # of the weight of a superblock
TARGETS_Q6_K = np.array((-128, 127, -125, -122, -119), dtype=np.float32)

FIXED = np.float32(2.0**20)
FIXED_NOISE = 64  # twice what cutting 32 errors to whole numbers can amount to
ROUNDS = 2  # of choosing multipliers anew at the best d
MXFP4_LARGEST = 252  # exponent: 6 * 2^(252 - 127) is still finite


# Numbers


@inlined
def near_half(x: np.float32) -> np.float32:
    """x rounded to a number that fp16 holds, saturated; no branches, so that it vectorises."""
    size = min(abs(x), FP16_MAX)
    wide = size * CUT_TO_11_BITS
    normal = wide - (wide - size)
    fixed = (size + HALF) - HALF  # multiples of 2^-24
    near = fixed if size < FP16_NORMAL else normal
    return np.float32(-near if x < ZERO else near)


@inlined
def near_inverse(step: np.float32) -> np.float32:
    """1/step, near enough for a search, and 0 where the step is 0."""
    return np.float32(step / (step * step + TINY))


@inlined
def nearest(scaled: np.float32, low: np.float32, high: np.float32) -> np.float32:
    """Whole number within low..high."""
    return np.float32((clamp(scaled, low, high) + ROUNDER) - ROUNDER)


# Sums over lanes. All arrays are flat, and few: see the module's docstring.


@jit
def step_sums(lanes: Floats, inverse: Floats, low: np.float32, high: np.float32,
              sums: Floats) -> None:  # fmt: skip
    """A [16] and B [16] of each lane, for the levels nearest to x * inverse."""
    sums[:32] = ZERO
    for tile in range(len(lanes) // TILE):
        part = lanes[tile * TILE : (tile + 1) * TILE]
        for g in range(LANES):
            along, square, scale = ZERO, ZERO, inverse[g]
            for k in range(DEPTH):
                level = nearest(part[k * 16 + g] * scale, low, high)
                along += level * part[WX + k * 16 + g]
                square += level * (level * part[W + k * 16 + g])
            sums[g] += along
            sums[16 + g] += square


@jit
def stored_sums(lanes: Floats, step: Floats, low: np.float32, high: np.float32,
                sums: Floats) -> None:  # fmt: skip
    """E [16] for levels nearest to x/step, Σ w l (x - step l) [16] and B [16] of each lane."""
    sums[:] = ZERO
    for tile in range(len(lanes) // TILE):
        part = lanes[tile * TILE : (tile + 1) * TILE]
        for g in range(LANES):
            error, along, square, s = ZERO, ZERO, ZERO, step[g]
            inverse = near_inverse(s)
            for k in range(DEPTH):
                x, w = part[k * 16 + g], part[W + k * 16 + g]
                level = nearest(x * inverse, low, high)
                missed = x - s * level
                weighted = w * level
                error += w * missed * missed
                along += weighted * missed
                square += weighted * level
            sums[g] += error
            sums[16 + g] += along
            sums[32 + g] += square


@jit
def peaks_of(lanes: Floats, peak: Floats) -> None:
    """Each lane's value of largest magnitude, with its sign."""
    for g in range(LANES):
        high, low = lanes[g], lanes[g]
        for tile in range(len(lanes) // TILE):
            for k in range(DEPTH):
                high = max(high, lanes[tile * TILE + k * 16 + g])
                low = min(low, lanes[tile * TILE + k * 16 + g])
        peak[g] = high if high >= -low else low


@jit
def best_steps(lanes: Floats, trials: Floats, low: np.float32, high: np.float32, found: Floats,
               sums: Floats) -> None:  # fmt: skip
    """Each lane's best step by itself, and its B: found [0:32].

    Tries the steps that put the lane's largest value at each of the levels `trials` and solves for
    the step that fits the levels best. A lane without weight gets the first step and B = 0.
    """
    peak, inverse = np.empty(16, np.float32), np.empty(16, np.float32)
    peaks_of(lanes, peak)
    for g in range(LANES):
        found[g] = peak[g] / trials[0]
        peak[g] = near_inverse(peak[g])
        found[16 + g] = ZERO
        found[32 + g] = ZERO
    for t in range(len(trials)):
        for g in range(LANES):
            inverse[g] = trials[t] * peak[g]
        step_sums(lanes, inverse, low, high, sums)
        favour = MARGIN if t == 0 else ONE
        for g in range(LANES):
            square = sums[16 + g]
            solved = sums[g] / max(square, TINY)
            gain = solved * sums[g] * favour
            better = gain > found[32 + g]
            found[g] = solved if better else found[g]
            found[16 + g] = square if better else found[16 + g]
            found[32 + g] = gain if better else found[32 + g]


# Superblocks: value = d * multiplier * level


@jit
def load_superblock(x: Floats, weights: Floats, lanes: Floats) -> None:
    """Values and weights (empty: all alike) of a superblock to lanes."""
    for tile in range(2):
        part = lanes[tile * TILE : (tile + 1) * TILE]
        for k in range(DEPTH):
            for g in range(16):
                part[k * 16 + g] = x[g * 16 + tile * DEPTH + k]
        if len(weights) == 0:
            part[WX:W] = part[:WX]
            part[W:] = ONE
            continue
        for k in range(DEPTH):
            for g in range(16):
                part[W + k * 16 + g] = weights[g * 16 + tile * DEPTH + k]
        for j in range(WX):
            part[WX + j] = part[W + j] * part[j]


@jit
def common_step(found: Floats, least: np.float32, target: np.float32,
                multiplier: Floats) -> np.float32:  # fmt: skip
    """d that puts the largest step at `target`, solved for so that d * multiplier ≈ step.

    The error of a step that is off by δ grows by B * δ²; groups without weight have no say.
    Multipliers are least..-least - 1.
    """
    largest, any_largest = ZERO, ZERO
    for g in range(LANES):
        step = found[g]
        any_largest = step if abs(step) > abs(any_largest) else any_largest
        counts = found[16 + g] > ZERO and abs(step) > abs(largest)
        largest = step if counts else largest
    d = near_half((largest if largest != ZERO else any_largest) / target)
    along, square = ZERO, ZERO
    inverse = near_inverse(d)
    for g in range(LANES):
        whole = nearest(found[g] * inverse, least, -least - ONE)
        along += whole * found[g] * found[16 + g]
        square += whole * whole * found[16 + g]
    if square > ZERO:
        d = near_half(along / square)
    inverse = near_inverse(d)
    for g in range(LANES):
        multiplier[g] = nearest(found[g] * inverse, least, -least - ONE)
    return d


@jit
def choose_multipliers(lanes: Floats, d: np.float32, multiplier: Floats, least: np.float32,
                       top: np.float32, sums: Floats) -> tuple[np.float32, np.float32]:  # fmt: skip
    """Each group's multiplier or a neighbour, by true error; returns E and d as solved for.

    E is an upper bound of the error with the d that is returned.
    """
    step, best = np.empty(16, np.float32), np.empty(64, np.float32)
    best[:16] = LARGEST
    for turn in range(3):
        offset = np.float32(turn if turn < 2 else -1)
        for g in range(LANES):
            step[g] = d * clamp(multiplier[g] + offset, least, -least - ONE)
        stored_sums(lanes, step, -top, top - ONE, sums)
        for g in range(LANES):
            better = sums[g] < best[g]
            best[16 + g] = sums[16 + g] if better else best[16 + g]
            best[32 + g] = sums[32 + g] if better else best[32 + g]
            best[48 + g] = offset if better else best[48 + g]
            best[g] = sums[g] if better else best[g]
    error, slope, bend = ZERO, ZERO, ZERO
    for g in range(LANES):
        m = clamp(multiplier[g] + best[48 + g], least, -least - ONE)
        multiplier[g] = m
        error += best[g]
        slope += m * best[16 + g]
        bend += m * m * best[32 + g]
    solved = near_half(d + slope / bend) if bend > ZERO else d
    moved = solved - d
    change = moved * (moved * bend - TWO * slope)
    return (error + change, solved) if change < ZERO else (error, d)


@jit
def fit_superblock(lanes: Floats, peaks: Floats, targets: Floats, few: int, top: np.float32,
                   least: np.float32, rounds: int, multiplier: Floats) -> np.float32:  # fmt: skip
    """d, which fp16 holds, and multipliers of one superblock in lanes.

    The best of `targets` is refined for as long as that helps, `rounds` times at most.
    """
    sums, found = np.empty(48, np.float32), np.empty(48, np.float32)
    trial = np.empty(16, np.float32)
    best_steps(lanes, peaks, -top, top - ONE, found, sums)
    heaviest, total = ZERO, ZERO
    for g in range(LANES):
        heaviest = max(heaviest, found[16 + g])
        total += found[16 + g]
    count = len(targets) if heaviest > MOST * total else few
    best, best_d = LARGEST, ZERO
    for turn in range(count + rounds):
        if turn < count:
            d = common_step(found, least, targets[turn], trial)
        else:
            d = best_d
            trial[:] = multiplier
        error, d = choose_multipliers(lanes, d, trial, least, top, sums)
        if error < best:
            best, best_d = error, d
            multiplier[:] = trial
        elif turn >= count:
            break
    return best_d


@jit
def round_superblock(x: Floats, d: np.float32, multiplier: Floats, top: np.float32,
                     levels: Bytes) -> None:  # fmt: skip
    """Levels 0..2 top - 1 nearest to what the stored fields decode to."""
    for g in range(16):
        inverse = safe_inverse(d * multiplier[g])
        values, whole = x[g * 16 : g * 16 + 16], levels[g * 16 : g * 16 + 16]
        for k in range(16):
            level = nearest(values[k] * inverse, -top, top - ONE)
            whole[k] = np.uint8(np.int32(level + top))


@jit
def pack_q3_k(levels: Bytes, d: np.float32, multiplier: Floats, out: Bytes) -> None:
    """High bits [32], low two bits [64], multipliers + 32 of six bits [12], d."""
    for m in range(32):
        bits = 0
        for b in range(8):
            bits |= (levels[32 * b + m] >> 2) << b
        out[m] = np.uint8(bits)
    for h in range(2):
        for m in range(32):
            bits = 0
            for k in range(4):
                bits |= (levels[128 * h + 32 * k + m] & 3) << (2 * k)
            out[32 + 32 * h + m] = np.uint8(bits)
    for g in range(8):
        first, second = int(multiplier[g]) + 32, int(multiplier[g + 8]) + 32
        out[96 + g] = np.uint8((first & 15) | (second & 15) << 4)
    for g in range(4):
        bits = 0
        for k in range(4):
            bits |= ((int(multiplier[4 * k + g]) + 32) >> 4) << (2 * k)
        out[104 + g] = np.uint8(bits)
    store_half(out, 108, d)


@jit
def pack_q6_k(levels: Bytes, d: np.float32, multiplier: Floats, out: Bytes) -> None:
    """Low four bits [128], high two bits [64], multipliers int8 [16], d."""
    for h in range(2):
        for m in range(64):
            low, high = levels[128 * h + m] & 15, levels[128 * h + 64 + m] & 15
            out[64 * h + m] = np.uint8(low | high << 4)
        for m in range(32):
            bits = 0
            for k in range(4):
                bits |= (levels[128 * h + 32 * k + m] >> 4) << (2 * k)
            out[128 + 32 * h + m] = np.uint8(bits)
    for g in range(16):
        out[192 + g] = np.uint8(int(multiplier[g]) & 0xFF)
    store_half(out, 208, d)


@jit
def encode_superblocks(x: Floats, weights: Floats, first: int, six: bool, peaks: Floats,
                       targets: Floats, few: int, rounds: int, top: np.float32, least: np.float32,
                       out: Bytes) -> None:  # fmt: skip
    """Q6_K or Q3_K: see `Kernel`."""
    lanes, multiplier = np.empty(2 * TILE, np.float32), np.empty(LANES, np.float32)
    levels = np.empty(SUPERBLOCK, np.uint8)
    for i in range(len(x)):
        row = weights[(first + i) % len(weights)] if len(weights) > 0 else x[i, :0]
        load_superblock(x[i], row, lanes)
        d = fit_superblock(lanes, peaks, targets, few, top, least, rounds, multiplier)
        round_superblock(x[i], d, multiplier, top, levels)
        if six:
            pack_q6_k(levels, d, multiplier, out[i])
        else:
            pack_q3_k(levels, d, multiplier, out[i])


def encode_q3_k(x: Floats, weights: Floats, first: int, out: Bytes) -> None:
    """See `Kernel`."""
    top, least = np.float32(4), np.float32(-32)
    plain = len(weights) == 0
    peaks = PEAKS_Q3_K_PLAIN if plain else PEAKS_Q3_K
    few = FEW_Q3_K_PLAIN if plain else FEW_Q3_K
    rounds = 1 if plain else ROUNDS
    encode_superblocks(x, weights, first, False, peaks, TARGETS_Q3_K, few, rounds, top, least, out)


def encode_q6_k(x: Floats, weights: Floats, first: int, out: Bytes) -> None:
    """See `Kernel`."""
    top, least = np.float32(32), np.float32(-128)
    encode_superblocks(
        x, weights, first, True, PEAKS_Q6_K, TARGETS_Q6_K, FEW_Q6_K, ROUNDS, top, least, out
    )


# MXFP4: value = code's value * 2^(exponent - 127)


@inlined
def power(exponent: int) -> np.float32:
    """2^(exponent - 127) for 0..254; for 0 the subnormal 2^-127."""
    return np.float32(np.int32(exponent << 23 if exponent > 0 else 1 << 22).view(np.float32))


@jit
def scaled_error(x: Floats, weights: Floats, inverse: np.float32, unit: np.float32) -> int:
    """Error of the nearest codes for x * inverse, in 2^-20 of unit^-1, at most 50 per value.

    Whole numbers, because their sum is the same in any order, and so the compiler may choose one.
    """
    total = 0
    for k in range(32):
        m = abs(x[k] * inverse)
        grid = HALF if m < TWO else (ONE if m < TWO + TWO else TWO)
        finer = TWO if m < TWO else (ONE if m < TWO + TWO else HALF)
        code = min((m * finer + ROUNDER) - ROUNDER, np.float32(12)) * grid
        missed = m - min(code, np.float32(6))
        total += int(np.int32(missed * missed * weights[k] * unit))
    return total


@jit
def fit_mxfp4(x: Floats, weights: Floats, weighted: bool) -> int:
    """Exponent: ggml's, which follows from the largest value, unless a neighbour is truly better.

    In units of ggml's exponent the largest value is within 4..8, and codes stop at 6. Without
    weights the finer neighbour, which clips it to 3, is never better.
    """
    largest = ZERO
    for k in range(32):
        largest = max(largest, abs(x[k]))
    plain = int(np.float32(largest).view(np.int32)) >> 23
    plain = min(max(plain - 2, 0), MXFP4_LARGEST)
    inverse = power(254 - plain)
    least = scaled_error(x, weights, inverse, FIXED) - FIXED_NOISE
    best = plain
    if plain < MXFP4_LARGEST:
        error = scaled_error(x, weights, inverse * HALF, FIXED * np.float32(4))
        if error < least:
            best, least = plain + 1, error
    if weighted and 0 < plain < MXFP4_LARGEST:
        error = scaled_error(x, weights, inverse * TWO, FIXED * np.float32(0.25))
        if error < least:
            best = plain - 1
    return best


@jit
def round_mxfp4(x: Floats, exponent: int, codes: Bytes) -> None:
    """Codes by magnitude m: 2m up to 2, m + 2 up to 4, m/2 + 4 beyond; bit 3 is the sign."""
    inverse = power(254 - exponent)
    for k in range(32):
        m = abs(x[k] * inverse)
        # Half a code more than that, for conversion to a whole number cuts.
        code = min(min(m * TWO + HALF, m + np.float32(2.5)), m * HALF + np.float32(4.5))
        codes[k] = np.uint8(np.int32(min(code, np.float32(7.5))) | (8 if x[k] < ZERO else 0))


@jit
def pack_mxfp4(codes: Bytes, exponent: int, out: Bytes) -> None:
    """Exponent, codes [16]: the first 16 values are low nibbles."""
    out[0] = np.uint8(exponent)
    packed = out[1:]
    for k in range(16):
        packed[k] = np.uint8(codes[k] | codes[16 + k] << 4)


@jit
def encode_mxfp4(x: Floats, weights: Floats, first: int, out: Bytes) -> None:
    """See `Kernel`."""
    codes, ones = np.empty(32, np.uint8), np.ones(32, np.float32)
    weighted = len(weights) > 0
    for i in range(len(x)):
        row = weights[(first + i) % len(weights)] if weighted else ones
        exponent = fit_mxfp4(x[i], row, weighted)
        round_mxfp4(x[i], exponent, codes)
        pack_mxfp4(codes, exponent, out[i])


KERNELS: dict[str, Kernel] = {"Q3_K": encode_q3_k, "Q6_K": encode_q6_k, "MXFP4": encode_mxfp4}
