"""Q2_K, Q4_K, Q5_K, compiled: the search of `k_asymmetric`, denser, one superblock at a time.

Owns: the fit of a superblock, its levels and its bytes. Leaves out: decoders and the torch encoder
(`k_asymmetric`), whose docstrings and that of `search` explain the sums used here.

A superblock lies in memory with a group's values G apart (value j of group g at j·G + g): sums over
a group are then halvings of the whole array, always in one order, which the compiler turns into
vector instructions without having to reorder an addition.

Groups are fitted freely first (`_fit_lines`). Units d and dmin are fitted to their steps and
offsets; then single steps of the integers and joint refits of the units take turns, each judged by
the error that the stored fields give (`_errors`).

Source of the layouts: block_q2_K, block_q4_K, block_q5_K and get_scale_min_k4 in ggml.
"""

import numpy as np
from numpy.typing import NDArray

from moequant.quants.compiled import (
    ONE,
    ZERO,
    Kernel,
    inlined,
    jit,
    safe_inverse,
    store_half,
    through_half,
)

SUPERBLOCK = 256
QUARTER = SUPERBLOCK // 4
MAX_GROUPS = 16

# Spans to try: steps beyond `top`, standard deviations to cover below the mean and above it.
WIDE = 1e9
STRETCHES = (0.0, -1.8, -1.4, -1.1, -0.8, -0.5, -0.25, 0.25, 0.5, 0.8)
SPANS = tuple((np.float32(stretch), np.float32(WIDE), np.float32(WIDE)) for stretch in STRETCHES)
# More, where a group's range is wider than FAR standard deviations: they leave out values far off
# that have little weight, or have the bulk share one level at the end.
FAR = np.float32(4.8)
FAR_SPANS = tuple(
    (np.float32(0), np.float32(below), np.float32(above))
    for below, above in ((2.2, 2.2), (3.2, 3.2), (0, WIDE), (WIDE, 0))
)
REFINEMENTS = 3
UNIT_STRETCHES = np.arange(-6, 7).astype(np.float32) / np.float32(8)  # in integers beyond `top`
COARSE = np.float32(1 / 6)  # of the highest scale: scales below it want several d to be tried,
UNIT_TRIALS = 24  # this many,
UNIT_TRIAL_STEP = np.float32(0.5)  # the largest step being this much less of d each time
# Of (scale, min): a wider step wants a deeper offset.
MOVES = tuple(
    (np.float32(scale), np.float32(depth))
    for scale, depth in ((1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))
)
ROUNDS = 2

VARIANCE_FLOOR = np.float32(1e-9)  # in steps²: below is one level and rounding noise
NOISE = np.float32(1 + 1e-6)
INDIFFERENT = np.float32(1e-6)  # relative difference of what two lines explain: about float32's
TINY_WEIGHT = np.float32(1e-6)  # of the heaviest group's weight: what every group counts at least
TINY_RANGE = np.float32(1e-30)  # far below what fp16 scales reach; keeps inverses finite
TWO = np.float32(2)
LEAST = np.float32(-3e38)
# Adding and subtracting it rounds |x| < 2^22 to the nearest whole number, ties to even.
ROUNDER = np.float32(1.5 * 2**23)


# Where things are in the memory of a superblock, one array. Values are laid out as the module says.
CENTRED = 0  # x - mean of the group
WEIGHTS = CENTRED + SUPERBLOCK  # that sum to 1 in a group
FIRST = WEIGHTS + SUPERBLOCK  # sums of `_moments`, per group in the end
SECOND = FIRST + SUPERBLOCK
CROSS = SECOND + SUPERBLOCK
INVERSES = CROSS + SUPERBLOCK  # [QUARTER] an inverse step per group, again and again
SHIFTS = INVERSES + QUARTER  # [QUARTER] likewise
# Per group from here on:
MEAN = SHIFTS + QUARTER
SPREAD = MEAN + MAX_GROUPS  # sum weights centred²
LOW = SPREAD + MAX_GROUPS  # of centred values that have weight
HIGH = LOW + MAX_GROUPS
IMPORTANCE = HIGH + MAX_GROUPS  # of the group in the superblock, the largest being 1
FREE_STEP = IMPORTANCE + MAX_GROUPS  # of the line that is best without regard to other groups
FREE_OFFSET = FREE_STEP + MAX_GROUPS
LEVEL_MEAN = FREE_OFFSET + MAX_GROUPS
VARIANCE = LEVEL_MEAN + MAX_GROUPS  # of its levels
EXPLAINED = VARIANCE + MAX_GROUPS  # how much of sum weights centred² it takes off
STEP = EXPLAINED + MAX_GROUPS  # of the line under trial
OFFSET = STEP + MAX_GROUPS
ERROR = OFFSET + MAX_GROUPS
BEST = ERROR + MAX_GROUPS  # error with the integers below
SCALES = BEST + MAX_GROUPS
MINS = SCALES + MAX_GROUPS
TRIAL_SCALES = MINS + MAX_GROUPS
TRIAL_MINS = TRIAL_SCALES + MAX_GROUPS
D = TRIAL_MINS + MAX_GROUPS
DMIN = D + 1
WORK_SIZE = DMIN + 1
Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@inlined
def _whole(x: np.float32, top: np.float32) -> np.float32:
    """The nearest whole number 0..top."""
    x = x if x > ZERO else ZERO
    x = x if x < top else top
    return (x + ROUNDER) - ROUNDER


@jit
def _halve(work: Floats, at: int, n: int, groups: int) -> None:
    """The first `groups` of work[at:at + n] become the groups' sums over it."""
    while n > groups:
        n //= 2
        for i in range(n):
            work[at + i] += work[at + n + i]


@jit
def _load(work: Floats, x: Floats, weights: Floats, groups: int) -> None:
    """Spread x [256] and weights [256] or [0] over `work`, centred and normalised."""
    size = SUPERBLOCK // groups
    share = ONE / np.float32(size)
    for g in range(groups):
        work[IMPORTANCE + g] = ONE
        for j in range(size):
            i = j * groups + g
            work[CENTRED + i] = x[g * size + j]
            work[WEIGHTS + i] = weights[g * size + j] if len(weights) else share
    if len(weights):
        for i in range(SUPERBLOCK):
            work[FIRST + i] = work[WEIGHTS + i]
        _halve(work, FIRST, SUPERBLOCK, groups)
        _normalise(work, groups, share)
    _centre(work, groups)


@jit
def _normalise(work: Floats, groups: int, share: np.float32) -> None:
    """Weights that sum to 1 in each group, given their totals at FIRST; the groups' importance.

    A group without weight counts its values alike.
    """
    largest = ZERO
    for g in range(groups):
        largest = max(largest, work[FIRST + g])
    relative = safe_inverse(largest)
    for g in range(groups):
        total = work[FIRST + g]
        work[IMPORTANCE + g] = max(total * relative, TINY_WEIGHT) if largest > ZERO else ONE
        inverse = safe_inverse(total)
        for i in range(WEIGHTS + g, WEIGHTS + SUPERBLOCK, groups):
            work[i] = work[i] * inverse if inverse > ZERO else share


@jit
def _centre(work: Floats, groups: int) -> None:
    """Take their mean off the groups' values; their range and spread."""
    for i in range(SUPERBLOCK):
        work[FIRST + i] = work[CENTRED + i] * work[WEIGHTS + i]
    _halve(work, FIRST, SUPERBLOCK, groups)
    for g in range(groups):
        work[MEAN + g] = work[FIRST + g]
        work[LOW + g], work[HIGH + g] = -LEAST, LEAST
    for j in range(0, SUPERBLOCK, groups):
        for g in range(groups):
            z = work[CENTRED + j + g] - work[MEAN + g]
            work[CENTRED + j + g] = z
            work[FIRST + j + g] = z * z * work[WEIGHTS + j + g]
            counts = work[WEIGHTS + j + g] > ZERO
            work[LOW + g] = min(work[LOW + g], z if counts else -LEAST)
            work[HIGH + g] = max(work[HIGH + g], z if counts else LEAST)
    _halve(work, FIRST, SUPERBLOCK, groups)
    for g in range(groups):
        work[SPREAD + g] = work[FIRST + g]


@jit
def _tile(work: Floats, groups: int) -> None:
    """Repeat the groups' inverse and shift, which begin INVERSES and SHIFTS."""
    for at in range(groups, QUARTER, groups):
        for g in range(groups):
            work[INVERSES + at + g] = work[INVERSES + g]
            work[SHIFTS + at + g] = work[SHIFTS + g]


@jit
def _moments(work: Floats, groups: int, top: np.float32) -> None:
    """Per group sums of levels - SHIFTS, of their squares and products with x, weighted.

    Levels are round(centred·inverse + shift). Four values at a time save memory traffic.
    """
    _tile(work, groups)
    for i in range(QUARTER):
        inverse, shift = work[INVERSES + i], work[SHIFTS + i]
        j, k, m = i + QUARTER, i + 2 * QUARTER, i + 3 * QUARTER
        a, b, c, d = work[CENTRED + i], work[CENTRED + j], work[CENTRED + k], work[CENTRED + m]
        p = _whole(a * inverse + shift, top) - shift
        q = _whole(b * inverse + shift, top) - shift
        r = _whole(c * inverse + shift, top) - shift
        s = _whole(d * inverse + shift, top) - shift
        wp, wq = p * work[WEIGHTS + i], q * work[WEIGHTS + j]
        wr, ws = r * work[WEIGHTS + k], s * work[WEIGHTS + m]
        work[FIRST + i] = (wp + wq) + (wr + ws)
        work[SECOND + i] = (wp * p + wq * q) + (wr * r + ws * s)
        work[CROSS + i] = (wp * a + wq * b) + (wr * c + ws * d)
    n = QUARTER
    while n > groups:
        n //= 2
        for i in range(n):
            work[FIRST + i] += work[FIRST + n + i]
            work[SECOND + i] += work[SECOND + n + i]
            work[CROSS + i] += work[CROSS + n + i]


@jit
def _errors(work: Floats, groups: int, top: np.float32) -> None:
    """At ERROR: sum weights (x - x̂)² per group, for the lines of STEP and OFFSET."""
    for g in range(groups):
        inverse = safe_inverse(work[STEP + g])
        work[INVERSES + g] = inverse
        work[SHIFTS + g] = (work[MEAN + g] - work[OFFSET + g]) * inverse
    _tile(work, groups)
    for i in range(QUARTER):
        inverse, shift = work[INVERSES + i], work[SHIFTS + i]
        j, k, m = i + QUARTER, i + 2 * QUARTER, i + 3 * QUARTER
        a = work[CENTRED + i] * inverse + shift
        b = work[CENTRED + j] * inverse + shift
        c = work[CENTRED + k] * inverse + shift
        d = work[CENTRED + m] * inverse + shift
        a -= _whole(a, top)
        b -= _whole(b, top)
        c -= _whole(c, top)
        d -= _whole(d, top)
        first = a * a * work[WEIGHTS + i] + b * b * work[WEIGHTS + j]
        second = c * c * work[WEIGHTS + k] + d * d * work[WEIGHTS + m]
        work[FIRST + i] = first + second
    _halve(work, FIRST, QUARTER, groups)
    for g in range(groups):
        missed = work[MEAN + g] - work[OFFSET + g]
        flat = work[SPREAD + g] + missed * missed
        error = work[STEP + g] * work[STEP + g] * work[FIRST + g]
        work[ERROR + g] = error if work[INVERSES + g] > ZERO else flat


@jit
def _keep_better_lines(work: Floats, groups: int) -> None:
    """Least squares through the levels of `_moments`; the free lines where it explains more."""
    for g in range(groups):
        mean, about = work[MEAN + g], work[FIRST + g]
        covariance = work[CROSS + g]
        variance = max(work[SECOND + g] - about * about * NOISE - VARIANCE_FLOOR, ZERO)
        level_mean = about + work[SHIFTS + g]
        step = max(covariance * safe_inverse(variance), ZERO)
        offset = mean - step * level_mean
        if offset > ZERO:  # the format has none: the best line through 0
            square = variance + level_mean * level_mean
            step = max((covariance + mean * level_mean) * safe_inverse(square), ZERO)
            offset = ZERO
        missed = step * level_mean + offset - mean
        explained = step * (TWO * covariance - step * variance) - missed * missed
        # Where the span does not matter (few distinct values), groups should agree: the first wins.
        if explained > work[EXPLAINED + g] + INDIFFERENT * abs(work[EXPLAINED + g]):
            work[FREE_STEP + g], work[FREE_OFFSET + g] = step, offset
            work[LEVEL_MEAN + g], work[VARIANCE + g] = level_mean, variance
            work[EXPLAINED + g] = explained


@jit
def _try_span(
    work: Floats,
    groups: int,
    top: np.float32,
    stretch: np.float32,
    below: np.float32,
    above: np.float32,
) -> None:
    """Free lines from levels that spread a part of each group's range over top + stretch steps."""
    for g in range(groups):
        deviation = np.float32(np.sqrt(work[SPREAD + g]))
        low = min(max(work[LOW + g], -below * deviation), -work[MEAN + g])
        high = min(work[HIGH + g], above * deviation)
        inverse = (top + stretch) / max(high - low, TINY_RANGE)
        work[INVERSES + g] = inverse
        work[SHIFTS + g] = -low * inverse
    _moments(work, groups, top)
    _keep_better_lines(work, groups)


@jit
def _fit_lines(work: Floats, groups: int, top: np.float32) -> None:
    """The best free line per group over candidate spans, refined by refitting."""
    far = False
    for g in range(groups):
        # Flat, for a group of one value.
        mean = work[MEAN + g]
        offset = min(mean, ZERO)
        work[FREE_STEP + g], work[FREE_OFFSET + g] = ZERO, offset
        work[LEVEL_MEAN + g], work[VARIANCE + g] = ZERO, ZERO
        work[EXPLAINED + g] = -((mean - offset) * (mean - offset))
        work[LOW + g] = min(work[LOW + g], -mean)
        far = far or work[HIGH + g] - work[LOW + g] > FAR * np.sqrt(work[SPREAD + g])
    for stretch, below, above in SPANS:
        _try_span(work, groups, top, stretch, below, above)
    if far:
        for stretch, below, above in FAR_SPANS:
            _try_span(work, groups, top, stretch, below, above)
    for _ in range(REFINEMENTS):
        for g in range(groups):
            inverse = safe_inverse(work[FREE_STEP + g])
            work[INVERSES + g] = inverse
            work[SHIFTS + g] = (work[MEAN + g] - work[FREE_OFFSET + g]) * inverse
        _moments(work, groups, top)
        _keep_better_lines(work, groups)


@jit
def _fit_unit(work: Floats, at: int, weights: int, groups: int, top: np.float32) -> np.float32:
    """fp16 unit so that integers 0..top times it come near values >= 0; see `search.fit_unit`.

    Values and weights are those at work[at:] and work[weights:].
    """
    largest = ZERO
    for g in range(groups):
        largest = max(largest, work[at + g])
    inverse = ONE / max(largest, TINY_RANGE)
    best, least = ZERO, -LEAST
    for stretch in UNIT_STRETCHES:
        wide = inverse * (top + stretch)
        along, square = ZERO, ZERO
        for g in range(groups):
            integer = _whole(work[at + g] * wide, top)
            weighted = work[weights + g] * integer
            along += weighted * work[at + g]
            square += weighted * integer
        unit = through_half(along * safe_inverse(square))
        wide = safe_inverse(unit)
        error = ZERO
        for g in range(groups):
            missed = work[at + g] - unit * _whole(work[at + g] * wide, top)
            error += work[weights + g] * missed * missed
        if error < least:
            best, least = unit, error
    return best


@jit
def _best_d(work: Floats, groups: int, scale_top: np.float32) -> np.float32:
    """d for the free lines' steps."""
    values, weights = STEP, OFFSET  # memory that is free here
    for g in range(groups):
        work[values + g] = work[FREE_STEP + g]
        # Where the offset can give way, a step's error shows only in the spread of the levels.
        curvature = work[VARIANCE + g]
        if work[FREE_OFFSET + g] >= ZERO:
            curvature += work[LEVEL_MEAN + g] * work[LEVEL_MEAN + g]
        work[weights + g] = work[IMPORTANCE + g] * curvature
    return _fit_unit(work, values, weights, groups, scale_top)


@jit
def _fields_for(work: Floats, d: np.float32, groups: int, scale_top: np.float32) -> np.float32:
    """Trial integers near the free lines for a given d, mins that keep the means; returns dmin."""
    values = STEP
    inverse = safe_inverse(d)
    for g in range(groups):
        scale = _whole(work[FREE_STEP + g] * inverse, scale_top)
        work[TRIAL_SCALES + g] = scale
        work[values + g] = max(d * scale * work[LEVEL_MEAN + g] - work[MEAN + g], ZERO)
    dmin = _fit_unit(work, values, IMPORTANCE, groups, scale_top)
    inverse = safe_inverse(dmin)
    for g in range(groups):
        work[TRIAL_MINS + g] = _whole(work[values + g] * inverse, scale_top)
    return dmin


@jit
def _quantize_lines(work: Floats, groups: int, top: np.float32, scale_top: np.float32) -> None:
    """Units and integers near the free lines.

    Where groups differ so much that some scale is a small integer, its rounding is no small
    change, and several d are judged by the error itself.
    """
    least = -LEAST
    d = _best_d(work, groups, scale_top)
    largest, smallest = ZERO, -LEAST
    for g in range(groups):
        largest = max(largest, work[FREE_STEP + g])
        smallest = min(smallest, work[FREE_STEP + g])
    trials = UNIT_TRIALS if smallest < COARSE * scale_top * d else 1
    for trial in range(trials):
        if trial > 0:
            d = through_half(largest / (scale_top - np.float32(trial - 1) * UNIT_TRIAL_STEP))
        dmin = _fields_for(work, d, groups, scale_top)
        error = _try(work, d, dmin, TRIAL_SCALES, groups, top)
        if error < least:
            least = error
            work[D], work[DMIN] = d, dmin
            for g in range(groups):
                work[BEST + g] = work[ERROR + g]
                work[SCALES + g], work[MINS + g] = work[TRIAL_SCALES + g], work[TRIAL_MINS + g]


@jit
def _try(
    work: Floats, d: np.float32, dmin: np.float32, integers: int, groups: int, top: np.float32
) -> np.float32:
    """At ERROR: what units and the scales and mins at work[integers:] give; the weighted sum."""
    for g in range(groups):
        work[STEP + g] = d * work[integers + g]
        work[OFFSET + g] = -(dmin * work[integers + MAX_GROUPS + g])
    _errors(work, groups, top)
    total = ZERO
    for g in range(groups):
        total += work[IMPORTANCE + g] * work[ERROR + g]
    return total


@jit
def _try_without_mins(work: Floats, groups: int, top: np.float32, scale_top: np.float32) -> None:
    """Groups without a min, or as zeros, where that is better: exact zeros that weigh much."""
    inverse = safe_inverse(work[D])
    for g in range(groups):
        highest = work[HIGH + g] + work[MEAN + g]
        work[TRIAL_SCALES + g] = _whole(highest / top * inverse, scale_top)
        work[TRIAL_MINS + g] = ZERO
    _try(work, work[D], work[DMIN], TRIAL_SCALES, groups, top)
    for g in range(groups):
        zeros = work[SPREAD + g] + work[MEAN + g] * work[MEAN + g]
        if zeros < work[ERROR + g]:
            work[ERROR + g], work[TRIAL_SCALES + g] = zeros, ZERO
        if work[ERROR + g] < work[BEST + g]:
            work[BEST + g] = work[ERROR + g]
            work[SCALES + g], work[MINS + g] = work[TRIAL_SCALES + g], ZERO


@jit
def _move(work: Floats, groups: int, top: np.float32, scale_top: np.float32) -> None:
    """Single steps of the groups' integers, each kept where the error falls."""
    for scale_by, min_by in MOVES:
        for g in range(groups):
            scale, depth = work[SCALES + g] + scale_by, work[MINS + g] + min_by
            work[TRIAL_SCALES + g] = min(max(scale, ZERO), scale_top)
            work[TRIAL_MINS + g] = min(max(depth, ZERO), scale_top)
        _try(work, work[D], work[DMIN], TRIAL_SCALES, groups, top)
        for g in range(groups):
            if work[ERROR + g] < work[BEST + g]:
                work[BEST + g] = work[ERROR + g]
                work[SCALES + g], work[MINS + g] = work[TRIAL_SCALES + g], work[TRIAL_MINS + g]


@jit
def _units_refitted(work: Floats, groups: int, top: np.float32) -> tuple[np.float32, np.float32]:
    """d and dmin by least squares over the superblock, levels and integers as they are."""
    for g in range(groups):
        inverse = safe_inverse(work[D] * work[SCALES + g])
        work[INVERSES + g] = inverse
        work[SHIFTS + g] = (work[MEAN + g] + work[DMIN] * work[MINS + g]) * inverse
    _moments(work, groups, top)
    dd, dm, mm, dx, mx = ZERO, ZERO, ZERO, ZERO, ZERO
    for g in range(groups):
        about, mean = work[FIRST + g], work[MEAN + g]
        level_mean = about + work[SHIFTS + g]
        square = work[SECOND + g] - about * about + level_mean * level_mean
        scale, depth = work[SCALES + g], work[MINS + g]
        share = work[IMPORTANCE + g]
        dd += share * scale * scale * square
        dm += share * scale * depth * level_mean
        mm += share * depth * depth
        dx += share * scale * (work[CROSS + g] + mean * level_mean)
        mx += share * depth * mean
    if mm == ZERO:  # no mins: d alone
        return through_half(dx * safe_inverse(dd)), work[DMIN]
    inverse = safe_inverse(dd * mm - dm * dm)
    return through_half((dx * mm - dm * mx) * inverse), through_half((dm * dx - dd * mx) * inverse)


@jit
def _refit_units(work: Floats, groups: int, top: np.float32) -> bool:
    """Refitted units if they lower the error; whether they did."""
    d, dmin = _units_refitted(work, groups, top)
    before = ZERO
    for g in range(groups):
        before += work[IMPORTANCE + g] * work[BEST + g]
    if d <= ZERO or dmin < ZERO or (d == work[D] and dmin == work[DMIN]):
        return False
    if not _try(work, d, dmin, SCALES, groups, top) < before:
        return False
    work[D], work[DMIN] = d, dmin
    for g in range(groups):
        work[BEST + g] = work[ERROR + g]
    return True


@jit
def fit_block(
    work: Floats, x: Floats, weights: Floats, groups: int, top: np.float32, scale_top: np.float32
) -> None:
    """Units (D, DMIN) and integers (SCALES, MINS) of the superblock x [256]."""
    low, high = x[0], x[0]
    for i in range(SUPERBLOCK):
        low, high = min(low, x[i]), max(high, x[i])
    if low == high:
        _fit_one_value(work, low, groups, top, scale_top)
        return
    _load(work, x, weights, groups)
    _fit_lines(work, groups, top)
    _quantize_lines(work, groups, top, scale_top)
    _try_without_mins(work, groups, top, scale_top)
    for _ in range(ROUNDS):
        _move(work, groups, top, scale_top)
        if not _refit_units(work, groups, top):
            break


@jit
def _fit_one_value(
    work: Floats, value: np.float32, groups: int, top: np.float32, scale_top: np.float32
) -> None:
    """Fields for a superblock of one value; see `k_asymmetric._one_value_exact`."""
    levels = int(top) if value > ZERO else 1
    size, least = abs(value), -LEAST
    best, multiple = ZERO, ZERO
    for integer in range(1, int(scale_top) + 1 if size > ZERO else 1):
        for level in range(1, levels + 1):
            factor = np.float32(integer * level)
            unit = through_half(np.float32(size / factor))
            missed = abs(unit * factor - size)
            if missed < least:
                least, best, multiple = missed, unit, np.float32(integer)
    negative = value < ZERO
    work[D], work[DMIN] = ZERO if negative else best, best if negative else ZERO
    for g in range(groups):
        work[SCALES + g] = ZERO if negative else multiple
        work[MINS + g] = multiple if negative else ZERO


@jit
def round_block(work: Floats, x: Floats, groups: int, top: np.float32, levels: Bytes) -> None:
    """Nearest levels of x [256] on the stored grid."""
    size = SUPERBLOCK // groups
    for g in range(groups):
        inverse = safe_inverse(work[D] * work[SCALES + g])
        depth = work[DMIN] * work[MINS + g]
        for i in range(g * size, (g + 1) * size):
            levels[i] = np.uint8(np.int32(_whole((x[i] + depth) * inverse, top)))


@jit
def _pack_integers_6bit(work: Floats, out: Bytes, at: int) -> None:
    """Low 6 bits of four scales and mins, then nibbles of the others, to out[at:at + 12].

    The high two bits of groups 4..7 sit above the six of groups 0..3.
    """
    for g in range(4):
        scale, later_scale = np.int32(work[SCALES + g]), np.int32(work[SCALES + g + 4])
        depth, later_depth = np.int32(work[MINS + g]), np.int32(work[MINS + g + 4])
        out[at + g] = np.uint8(scale | (later_scale >> 4) << 6)
        out[at + g + 4] = np.uint8(depth | (later_depth >> 4) << 6)
        out[at + g + 8] = np.uint8((later_scale & 15) | (later_depth & 15) << 4)


@jit
def _pack_nibbles(levels: Bytes, out: Bytes, at: int) -> None:
    """Low four bits of 256 levels to out[at:]: of every 64, the first 32 in the low nibbles."""
    for half in range(4):
        for j in range(32):
            i = 64 * half + j
            out[at + 32 * half + j] = np.uint8((levels[i] & 15) | (levels[i + 32] & 15) << 4)


@jit
def _pack_q2_k(work: Floats, levels: Bytes, out: Bytes) -> None:
    for g in range(16):
        out[g] = np.uint8(np.int32(work[SCALES + g]) | np.int32(work[MINS + g]) << 4)
    for half in range(2):
        for j in range(32):
            i = 128 * half + j
            low, high = levels[i] | levels[i + 32] << 2, levels[i + 64] | levels[i + 96] << 2
            out[16 + 32 * half + j] = np.uint8(low | high << 4)
    store_half(out, 80, work[D])
    store_half(out, 82, work[DMIN])


@jit
def _pack_fifth_bits(levels: Bytes, out: Bytes, at: int) -> None:
    """Bit 4 of 256 levels to out[at:at + 32]: byte j has those of value j of every 32."""
    for j in range(32):
        fifth = 0
        for g in range(8):
            fifth |= (levels[32 * g + j] >> 4) << g
        out[at + j] = np.uint8(fifth)


@jit
def pack_block(work: Floats, levels: Bytes, out: Bytes, groups: int, top: np.float32) -> None:
    """The bytes of a superblock; its type is told by its shape."""
    if groups == 16:
        _pack_q2_k(work, levels, out)
        return
    store_half(out, 0, work[D])
    store_half(out, 2, work[DMIN])
    _pack_integers_6bit(work, out, 4)
    if top > 15:
        _pack_fifth_bits(levels, out, 16)
    _pack_nibbles(levels, out, 48 if top > 15 else 16)


@jit
def _encode(
    x: Floats, weights: Floats, first: int, out: Bytes,
    groups: int, top: np.float32, scale_top: np.float32,
) -> None:  # fmt: skip
    work = np.empty(WORK_SIZE, np.float32)
    levels = np.empty(SUPERBLOCK, np.uint8)
    none = np.empty(0, np.float32)
    for i in range(len(x)):
        row = weights[(first + i) % len(weights)] if len(weights) else none
        fit_block(work, x[i], row, groups, top, scale_top)
        round_block(work, x[i], groups, top, levels)
        pack_block(work, levels, out[i], groups, top)


def _kernel(groups: int, top: int, scale_top: int) -> Kernel:
    def encode(x: Floats, weights: Floats, first: int, out: Bytes) -> None:
        _encode(x, weights, first, out, groups, np.float32(top), np.float32(scale_top))

    return encode


KERNELS: dict[str, Kernel] = {
    "Q2_K": _kernel(16, 3, 15),
    "Q4_K": _kernel(8, 15, 63),
    "Q5_K": _kernel(8, 31, 63),
}
