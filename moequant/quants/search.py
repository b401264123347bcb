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

from moequant.quants.blocks import (
    column_sum,
    column_sum_,
    first_largest,
    safe_inverse,
    scratch,
    through_fp16,
)

# Taken off a variance of levels, which below them is that of one level and rounding noise.
VARIANCE_FLOOR = 1e-9  # in steps²
TINY_RANGE = 1e-30  # far below what fp16 scales reach; keeps inverses finite
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
    """Values to fit, [size, N]: N groups of `size` values, centred, with weights that sum to 1.

    Lives in this thread's scratch memory: one at a time.
    """

    centred: Tensor  # x - mean [size, N]
    weights: Tensor  # [size, N]
    weighted: Tensor  # weights * centred
    mean: Tensor  # [N]
    total: Tensor  # [N] what the weights summed to before
    about: Tensor  # [size, N], room for `moments`
    products: Tensor  # [size, 3, N], likewise


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
    size, n = x.shape
    shares = scratch("shares", x, size, n)
    if weights is None:
        shares.fill_(1.0 / size)
        total = torch.ones_like(x[0])
    else:
        total = column_sum_(scratch("about", x, size, n).copy_(weights)).clone()
        torch.mul(weights, safe_inverse(total), out=shares)
        if bool((total == 0).any()):
            shares.masked_fill_(total == 0, 1.0 / size)
    mean = column_sum_(torch.mul(shares, x, out=scratch("about", x, size, n))).clone()
    centred = torch.sub(x, mean, out=scratch("centred", x, size, n))
    weighted = torch.mul(shares, centred, out=scratch("weighted", x, size, n))
    about, products = scratch("about", x, size, n), scratch("products", x, size, 3, n)
    return Columns(centred, shares, weighted, mean, total, about, products)


def moments(columns: Columns, inverse: Tensor, shift: Tensor, top: int) -> Tensor:
    """Mean, variance and covariance with x of levels round(centred·inverse + shift), [3, N]."""
    about, products = columns.about, columns.products
    torch.mul(columns.centred, inverse, out=about)
    about.add_(shift).round_().clamp_(0, top).sub_(shift)
    torch.mul(about, columns.weights, out=products[:, 0])
    torch.mul(about, products[:, 0], out=products[:, 1])
    torch.mul(about, columns.weighted, out=products[:, 2])
    sums = column_sum_(products).clone()
    first, second, _ = sums.unbind(0)
    second.sub_(first * first * (1 + NOISE)).sub_(VARIANCE_FLOOR).clamp_(min=0)
    first.add_(shift)
    return sums


def explained_by(found: Tensor, mean: Tensor, step: Tensor, offset: Tensor) -> Tensor:
    """What a given step and offset take off the error, for the moments [3, N] of its levels."""
    level_mean, variance, covariance = found.unbind(0)
    missed = step * level_mean + offset - mean
    return step * (2 * covariance - step * variance) - missed * missed


def lines_through(found: Tensor, mean: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
    """Step and offset by least squares within limits, for moments [3, ..., N] of the levels."""
    level_mean, variance, covariance = found.unbind(0)
    # A negative step, from levels that run against the data, gives way to a flat line.
    step = (covariance * safe_inverse(variance)).clamp_(min=0)
    offset = mean - step * level_mean
    if limits.nonpositive:
        steeper = step_for(found, mean, torch.zeros_like(mean))
        step = torch.where(offset > 0, steeper, step)
        offset.clamp_(max=0)
    if limits.fp16:
        offset = through_fp16(offset)
        step = through_fp16(step_for(found, mean, offset))
    return step, offset


def step_for(found: Tensor, mean: Tensor, offset: Tensor) -> Tensor:
    """The best step >= 0 when the offset is given, for moments [3, ..., N] of the levels."""
    level_mean, variance, covariance = found.unbind(0)
    along = covariance + (mean - offset) * level_mean
    square = (variance + level_mean * level_mean).sub_(VARIANCE_FLOOR).clamp_(min=0)
    return (along * safe_inverse(square)).clamp_(min=0)


def fit_lines(
    columns: Columns, limits: Limits, stretches: tuple[float, ...], refinements: int
) -> Line:
    """The best line per group over candidate spans, then refined by rounding and refitting.

    A candidate spreads the group's range over top + stretch steps, the lowest value at level 0.
    Below 0 the range takes fewer steps than there are; above 0 the highest values are clipped,
    which refitting makes good. The first stretch wins where others are hardly better.
    """
    mean = columns.mean
    low, high = columns.centred.amin(0), columns.centred.amax(0)
    if limits.nonpositive:
        low = torch.minimum(low, -mean)
    inverse = safe_inverse((high - low).clamp_(min=TINY_RANGE))
    found = []
    for stretch in stretches:
        wide = inverse * (limits.top + stretch)
        found.append(moments(columns, wide, -low * wide, limits.top))
    candidates = torch.stack(found, 1)
    explained = explained_by(candidates, mean, *lines_through(candidates, mean, limits))
    # Where the span does not matter (few distinct values), groups of a superblock should agree.
    explained[0].add_(explained[0].abs() * INDIFFERENT)
    choice = first_largest(explained).expand(3, 1, -1)
    best = _line(candidates.gather(1, choice)[:, 0], mean, limits)
    best = _flat_where_better(best, mean, limits)
    for _ in range(refinements):
        inverse = safe_inverse(best[3])
        found_again = moments(columns, inverse, (mean - best[4]) * inverse, limits.top)
        line = _line(found_again, mean, limits)
        best = torch.where(line[5] > best[5], line, best)
    return Line(best)


def _line(found: Tensor, mean: Tensor, limits: Limits) -> Tensor:
    """The table of a `Line` for moments [3, N]."""
    step, offset = lines_through(found, mean, limits)
    explained = explained_by(found, mean, step, offset)
    return torch.cat((found, torch.stack((step, offset, explained))))


def _flat_where_better(best: Tensor, mean: Tensor, limits: Limits) -> Tensor:
    """Lines, with step 0 at the mean where nothing beats that: a group of one value."""
    offset = mean.clamp(max=0) if limits.nonpositive else mean
    zero = torch.zeros_like(mean)
    missed = mean - offset
    flat = torch.stack((zero, zero, zero, zero, offset, -missed * missed))
    return torch.where(flat[5] >= best[5], flat, best)


def fit_unit(values: Tensor, weights: Tensor, top: int) -> Tensor:
    """fp16 unit [n] so that integers 0..top times it come near values [g, n], all >= 0.

    Minimises sum_g weights (value - unit·integer)² over candidates that put the largest value at
    top + stretch, each with its unit refitted and rounded to fp16.
    """
    stretches = torch.tensor(UNIT_STRETCHES, device=values.device).view(-1, 1)
    inverse = (top + stretches) * safe_inverse(values.amax(0).clamp_(min=TINY_RANGE))
    values, weights = values.unsqueeze(1), weights.unsqueeze(1)
    integers = (values * inverse).round_().clamp_(0, top)  # [g, candidates, n]
    weighted = weights * integers
    along, square = column_sum(torch.stack((weighted * values, weighted * integers), 1))
    unit = through_fp16(along * safe_inverse(square))
    missed = values - integers_of(values, unit, top) * unit
    error = column_sum(weights * missed * missed)
    return unit.gather(0, first_largest(-error).unsqueeze(0))[0]


def integers_of(values: Tensor, unit: Tensor, top: int) -> Tensor:
    """Nearest integer 0..top to value/unit; 0 where the unit is 0."""
    return (values * safe_inverse(unit)).round_().clamp_(0, top)


def group_weights(total: Tensor) -> Tensor:
    """[g, n] weights of the groups of a superblock: largest 1, none quite 0."""
    largest = total.amax(0)
    relative = (total * safe_inverse(largest)).clamp_(min=TINY_WEIGHT)
    return torch.where(largest > 0, relative, 1.0)
