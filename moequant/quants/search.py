"""The search for steps and offsets that affine types share: x ≈ step·level + offset.

Owns: weighted least squares on columns, candidates and refinement, integers under one fp16 unit.
Leaves out: any type's layout; symmetric and codebook types.

With weights that sum to 1 and x centred on its weighted mean, levels l have the best step
cov(l, x)/var(l), which takes cov²/var off the error: what to look for is the highest squared
correlation of levels with x. Three sums per candidate say it all; no second pass measures the
error. Levels are centred as well, on where the mean of x falls, so that the sums do not cancel.

The objective is sum w (x - x̂)² with the given weights alone: the error of the layer's output, if
its inputs are uncorrelated. (ggml's searches multiply the weights by sqrt(sigma² + x²).)

Source of the idea: make_qkx3_quants and make_qp_quants in ggml-quants.c.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moequant.quants.blocks import column_sum, safe_inverse, through_fp16

# A variance of levels below these is one level and rounding noise; it counts as 0.
VARIANCE_FLOOR = 1e-9  # in steps²
INDIFFERENT = 1e-6  # relative difference of what two lines explain: about float32's
NOISE = 1e-6  # of the square of how far the mean level is from where the mean of x falls
TINY_WEIGHT = 1e-6  # of the heaviest group's weight: what every group counts at least

UNIT_STRETCHES = (-0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75)  # in integers beyond `top`


@dataclass(frozen=True)
class Limits:
    """What a type can store: levels 0..top, offsets of one sign only, both fields fp16 or free."""

    top: int
    nonpositive: bool
    fp16: bool


@dataclass(frozen=True)
class Columns:
    """Values to fit, [size, N]: N groups of `size` values, centred, with weights that sum to 1."""

    centred: Tensor  # x - mean [size, N]
    weights: Tensor  # [size, N]
    weighted: Tensor  # weights * centred
    mean: Tensor  # [N]
    total: Tensor  # [N] what the weights summed to before


@dataclass(frozen=True)
class Line:
    """A fit per group; rows of `table` [6, ..., N] are what the properties name.

    `explained` is how much of sum w (x - mean)² the line takes off.
    """

    table: Tensor

    @property
    def level_mean(self) -> Tensor:
        return self.table[0]

    @property
    def level_variance(self) -> Tensor:
        return self.table[1]

    @property
    def covariance(self) -> Tensor:
        return self.table[2]

    @property
    def step(self) -> Tensor:
        return self.table[3]

    @property
    def offset(self) -> Tensor:
        return self.table[4]

    @property
    def explained(self) -> Tensor:
        return self.table[5]


def columns_of(x: Tensor, weights: Tensor | None) -> Columns:
    """Centre and normalise x [size, N]; a group whose weights are all zero counts all alike."""
    size = x.shape[0]
    if weights is None:
        shares = torch.full_like(x, 1.0 / size)
        total = torch.ones_like(x[0])
    else:
        total = column_sum(weights)
        shares = weights * safe_inverse(total)
        shares = torch.where(total > 0, shares, 1.0 / size)
    mean = column_sum(shares * x)
    centred = x - mean
    return Columns(centred, shares, shares * centred, mean, total)


def moments(columns: Columns, inverse: Tensor, shift: Tensor, top: int) -> Tensor:
    """Mean, variance and covariance with x of levels round(centred·inverse + shift), [3, N]."""
    about = (columns.centred * inverse).add_(shift).round_().clamp_(0, top).sub_(shift)
    size, n = about.shape
    products = about.new_empty(size, 3, n)
    torch.mul(about, columns.weights, out=products[:, 0])
    torch.mul(about, products[:, 0], out=products[:, 1])
    torch.mul(about, columns.weighted, out=products[:, 2])
    sums = column_sum(products)
    square = sums[0] * sums[0]
    sums[1] -= square
    sums[1] *= sums[1] > square.mul_(NOISE).add_(VARIANCE_FLOOR)
    sums[0] += shift
    return sums


def explained_by(found: Tensor, mean: Tensor, step: Tensor, offset: Tensor) -> Tensor:
    """What a given step and offset take off the error, for the moments [3, N] of its levels."""
    level_mean, variance, covariance = found
    missed = step * level_mean + offset - mean
    return step * (2 * covariance - step * variance) - missed * missed


def lines_through(found: Tensor, mean: Tensor, limits: Limits) -> Line:
    """Weighted least squares within limits, for moments [3, ..., N]."""
    level_mean, variance, covariance = found
    step = covariance * safe_inverse(variance)
    offset = mean - step * level_mean
    if limits.nonpositive:
        along = covariance + mean * level_mean
        square = variance + level_mean * level_mean
        steeper = along * safe_inverse(square) * (square > VARIANCE_FLOOR)
        barred = (offset > 0) | (variance == 0)
        step = torch.where(barred, steeper, step)
        offset = offset.masked_fill_(barred, 0.0)
    if limits.fp16:
        step = through_fp16(step)
        offset = through_fp16(mean - step * level_mean)
    explained = explained_by(found, mean, step, offset)
    # A negative step comes from a cut that runs against the data: never the best one.
    explained.masked_fill_(step <= 0, -torch.inf)
    return Line(torch.cat((found, torch.stack((step, offset, explained)))))


def fit_lines(
    columns: Columns, limits: Limits, stretches: tuple[float, ...], refinements: int
) -> Line:
    """The best line per group over candidate spans, then refined by rounding and refitting.

    A candidate spreads the group's range over top + stretch steps, the lowest value at level 0.
    Below 0 the range takes fewer steps than there are; above 0 the highest values are clipped,
    which refitting makes good. The first stretch wins where others are hardly better.
    """
    low, high = columns.centred.amin(0), columns.centred.amax(0)
    if limits.nonpositive:
        low = torch.minimum(low, -columns.mean)
    inverse = safe_inverse(high - low)
    found = []
    for stretch in stretches:
        wide = inverse * (limits.top + stretch)
        found.append(moments(columns, wide, -low * wide, limits.top))
    lines = lines_through(torch.stack(found, 1), columns.mean, limits).table
    # Where the span does not matter (few distinct values), groups of a superblock should agree.
    lines[5, 0] += lines[5, 0].abs() * INDIFFERENT
    choice = lines[5].argmax(0)
    best = lines.gather(1, choice.expand(6, 1, -1))[:, 0]
    best = _flat_where_better(best, columns.mean, limits)
    for _ in range(refinements):
        best = _refined(columns, best, limits)
    return Line(best)


def _flat_where_better(best: Tensor, mean: Tensor, limits: Limits) -> Tensor:
    """Lines, with step 0 at the mean where nothing beats that: a group of one value."""
    offset = mean.clamp(max=0) if limits.nonpositive else mean
    zero = torch.zeros_like(mean)
    missed = mean - offset
    flat = torch.stack((zero, zero, zero, zero, offset, -missed * missed))
    return torch.where(flat[5] >= best[5], flat, best)


def _refined(columns: Columns, best: Tensor, limits: Limits) -> Tensor:
    inverse = safe_inverse(best[3])
    shift = (columns.mean - best[4]) * inverse
    line = lines_through(moments(columns, inverse, shift, limits.top), columns.mean, limits).table
    return torch.where(line[5] > best[5], line, best)


def fit_unit(values: Tensor, weights: Tensor, top: int) -> Tensor:
    """fp16 unit [n] so that integers 0..top times it come near values [g, n], all >= 0.

    Minimises sum_g weights (value - unit·integer)² over candidates that put the largest value at
    top + stretch, each with its unit refitted and rounded to fp16.
    """
    stretches = torch.tensor(UNIT_STRETCHES, device=values.device).view(-1, 1)
    inverse = (top + stretches) * safe_inverse(values.amax(0))
    values, weights = values.unsqueeze(1), weights.unsqueeze(1)
    integers = (values * inverse).round_().clamp_(0, top)  # [g, candidates, n]
    weighted = weights * integers
    along, square = column_sum(torch.stack((weighted * values, weighted * integers), 1))
    unit = through_fp16(along * safe_inverse(square))
    missed = values - integers_of(values, unit, top) * unit
    error = column_sum(weights * missed * missed)
    return unit.gather(0, error.argmin(0, keepdim=True))[0]


def integers_of(values: Tensor, unit: Tensor, top: int) -> Tensor:
    """Nearest integer 0..top to value/unit; 0 where the unit is 0."""
    return (values * safe_inverse(unit)).round_().clamp_(0, top)


def group_weights(total: Tensor) -> Tensor:
    """[g, n] weights of the groups of a superblock: largest 1, none quite 0."""
    largest = total.amax(0)
    relative = (total * safe_inverse(largest)).clamp_(min=TINY_WEIGHT)
    return torch.where(largest > 0, relative, 1.0)
