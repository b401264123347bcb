"""Q2_K, Q4_K, Q5_K: superblocks of 256 whose groups have a step and an offset.

Owns: the fit of a superblock (fp16 `d` and `dmin`, integer scales and mins), its bytes. Leaves
out: the search inside a group (`search`).

A value is d·scale·level − dmin·min. Groups are fitted freely first; then integers are fitted to
their steps and, given those, to the offsets that keep each group's mean. What that costs is won
back in part by single steps of the integers and a joint refit of d and dmin, each kept only where
the error falls.

Source of the layouts: block_q2_K, block_q4_K, block_q5_K and get_scale_min_k4 in ggml.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moequant.quants.blocks import (
    FP16_MAX,
    Codec,
    Scales,
    as_columns,
    column_sum,
    fp16_field,
    read_fp16,
    round_affine,
    safe_inverse,
    through_fp16,
    to_bytes,
)
from moequant.quants.search import (
    Columns,
    Limits,
    Line,
    columns_of,
    explained_by,
    fit_lines,
    fit_unit,
    group_weights,
    integers_of,
    moments,
)

SUPERBLOCK = 256
STRETCHES = (0.0, -1.8, -1.2, -0.8, -0.4, 0.4, 0.8)  # spans to try, in steps beyond `top`
REFINEMENTS = 3
MOVES = ((1, 1), (-1, -1))  # of (scale, min): a wider step wants a deeper offset


@dataclass(frozen=True)
class Shape:
    """What tells the three types apart: group size, highest level, highest integer scale."""

    size: int
    top: int
    scale_top: int

    @property
    def groups(self) -> int:
        return SUPERBLOCK // self.size


@dataclass(frozen=True)
class Grid:
    """Scale fields of n superblocks: units d and dmin [2, n], integers of each [2, g, n]."""

    units: Tensor
    integers: Tensor

    @property
    def step(self) -> Tensor:
        return self.units[0] * self.integers[0]

    @property
    def offset(self) -> Tensor:
        return -(self.units[1] * self.integers[1])


@dataclass(frozen=True)
class Fitted:
    """A grid, the moments [3, g, n] of its levels, and what it explains per group [g, n]."""

    grid: Grid
    found: Tensor
    explained: Tensor


def _per_group(values: Tensor, groups: int) -> Tensor:
    """[..., n*g], as columns hold groups, to [..., g, n]."""
    shape = (*values.shape[:-1], -1, groups)
    return values.view(shape).transpose(-1, -2).contiguous()


def _per_column(values: Tensor) -> Tensor:
    """Inverse of `_per_group`."""
    return values.transpose(-1, -2).flatten(-2)


def fit(shape: Shape, x: Tensor, weights: Tensor | None) -> Scales:
    """Scales of superblocks x [n, 256] so that sum weights (x - x̂)² is small."""
    if weights is not None:
        weights = as_columns(weights, shape.size, "w")
    columns = columns_of(as_columns(x, shape.size, "x"), weights)
    importance = group_weights(_per_group(columns.total, shape.groups))
    limits = Limits(shape.top, nonpositive=True, fp16=False)
    line = fit_lines(columns, limits, STRETCHES, REFINEMENTS)
    mean = _per_group(columns.mean, shape.groups)
    best = _measured(shape, columns, mean, _quantized(shape, line, mean, importance))
    for move in MOVES:
        best = _moved(shape, columns, mean, best, move)
    best = _refitted(shape, columns, mean, best, importance)
    grid = _one_value_exact(shape, x, best.grid)
    return Scales(grid.step.t(), grid.offset.t(), (grid.units.t(), grid.integers.permute(2, 0, 1)))


def _quantized(shape: Shape, line: Line, mean: Tensor, importance: Tensor) -> Grid:
    """Units and integers near free lines: first the steps, then offsets that keep the means."""
    table = _per_group(line.table, shape.groups)
    level_mean, variance, _, step, offset, _ = table
    # Where the offset can give way, a step's error shows only in the spread of the levels.
    curvature = variance + (offset >= 0) * level_mean * level_mean
    d = fit_unit(step, importance * curvature, shape.scale_top)
    scales = integers_of(step, d, shape.scale_top)
    depth = (d * scales * level_mean - mean).clamp_(min=0)
    dmin = fit_unit(depth, importance, shape.scale_top)
    mins = integers_of(depth, dmin, shape.scale_top)
    return Grid(torch.stack((d, dmin)), torch.stack((scales, mins)))


def _measured(shape: Shape, columns: Columns, mean: Tensor, grid: Grid) -> Fitted:
    step, offset = grid.step, grid.offset
    inverse = safe_inverse(step)
    shift = (mean - offset) * inverse
    found = moments(columns, _per_column(inverse), _per_column(shift), shape.top)
    found = _per_group(found, shape.groups)
    return Fitted(grid, found, explained_by(found, mean, step, offset))


def _moved(
    shape: Shape, columns: Columns, mean: Tensor, best: Fitted, move: tuple[int, int]
) -> Fitted:
    """Integers one step aside, in the groups where that lowers the error."""
    by = torch.tensor(move, device=mean.device).view(2, 1, 1)
    integers = (best.grid.integers + by).clamp_(0, shape.scale_top)
    moved = _measured(shape, columns, mean, Grid(best.grid.units, integers))
    better = moved.explained > best.explained
    return _where(better, moved, best)


def _refitted(
    shape: Shape, columns: Columns, mean: Tensor, best: Fitted, importance: Tensor
) -> Fitted:
    """d and dmin by least squares over the whole superblock, levels and integers as they are."""
    level_mean, variance, covariance = best.found
    scales, mins = best.grid.integers
    terms = torch.stack(
        (
            scales * scales * (variance + level_mean * level_mean),
            scales * mins * level_mean,
            mins * mins,
            scales * (covariance + mean * level_mean),
            mins * mean,
        ),
        1,
    )
    dd, dm, mm, dx, mx = column_sum(terms * importance.unsqueeze(1))
    inverse = safe_inverse(dd * mm - dm * dm)
    units = through_fp16(torch.stack((dx * mm - dm * mx, dm * dx - dd * mx)) * inverse)
    units = torch.where((units > 0).all(0), units, best.grid.units)
    refitted = _measured(shape, columns, mean, Grid(units, best.grid.integers))
    gain = column_sum(importance * (refitted.explained - best.explained))
    return _where(gain > 0, refitted, best)


def _one_value_exact(shape: Shape, x: Tensor, grid: Grid) -> Grid:
    """The grid, with superblocks of one value replaced by what comes nearest to that value.

    A positive one is d·k for a product k of scale and level, a negative one -dmin·min: fp16
    rounds d differently for each k, and the best of them beats the search, whose measure of the
    error is no finer than float32 of the square.
    """
    flat = torch.nonzero(x.amax(1) == x.amin(1))[:, 0]
    if len(flat) == 0:
        return grid
    value = x[flat, 0]
    integers = torch.arange(1.0, shape.scale_top + 1, device=x.device)
    levels = torch.arange(1.0, shape.top + 1, device=x.device)
    nearest = [
        _nearest_multiple(value.clamp(min=0), (integers.unsqueeze(1) * levels).flatten()),
        _nearest_multiple((-value).clamp(min=0), integers),
    ]
    units, counts = grid.units.clone(), grid.integers.clone()
    units[:, flat] = torch.stack([unit for unit, _ in nearest])
    # flatten() above put levels last: the integer is what is left after dividing by their number.
    scales = nearest[0][1].div(shape.top, rounding_mode="floor") + 1
    mins = nearest[1][1] + 1
    counts[:, :, flat] = torch.stack((scales, mins)).unsqueeze(1).float()
    return Grid(units, counts)


def _nearest_multiple(value: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """fp16 unit [n] and the index of the factor whose product comes nearest to values [n]."""
    factors = factors.unsqueeze(1)
    units = through_fp16(value / factors)
    choice = (units * factors - value).abs().argmin(0)
    return units.gather(0, choice.unsqueeze(0))[0], choice


def _where(better: Tensor, new: Fitted, old: Fitted) -> Fitted:
    """New where better: [g, n] (the units are the same then) or [n]."""
    grid = Grid(
        torch.where(better if better.dim() == 1 else better.any(0), new.grid.units, old.grid.units),
        torch.where(better, new.grid.integers, old.grid.integers),
    )
    return Fitted(
        grid,
        torch.where(better, new.found, old.found),
        torch.where(better, new.explained, old.explained),
    )


# Bytes. Integers of `Scales.stored` are [n, 2, g]: scales, then mins.


def _units_fields(scales: Scales) -> Tensor:
    """d and dmin, uint8 [n, 4]."""
    return fp16_field(scales.stored[0]).flatten(1)


def _pack_scales_6bit(integers: Tensor) -> Tensor:
    """[n, 2, 8] to [n, 12]: low 6 bits of four scales and mins, then nibbles of the others.

    The high two bits of groups 4..7 sit above the six of groups 0..3.
    """
    low, rest = integers[..., :4], integers[..., 4:]
    high = (rest / 16).floor_()
    nibbles = rest - 16 * high
    first = (low + 64 * high).flatten(1)
    return to_bytes(torch.cat((first, nibbles[:, 0] + 16 * nibbles[:, 1]), 1))


def _unpack_scales_6bit(packed: Tensor) -> tuple[Tensor, Tensor]:
    """[n, 12] to scales and mins, uint8 [n, 8] each."""
    first, second, nibbles = packed.split(4, dim=1)
    scales = torch.cat((first & 63, (nibbles & 15) | (first >> 6 << 4)), 1)
    mins = torch.cat((second & 63, (nibbles >> 4) | (second >> 6 << 4)), 1)
    return scales, mins


def _pack_q2_k(levels: Tensor, scales: Scales) -> Tensor:
    integers = scales.stored[1]
    quarters = levels.view(-1, 2, 4, 32)
    packed = quarters[:, :, 0] + 4 * quarters[:, :, 1]
    packed += 16 * quarters[:, :, 2]
    packed += 64 * quarters[:, :, 3]
    nibbles = to_bytes(integers[:, 0] + 16 * integers[:, 1])
    return torch.cat((nibbles, to_bytes(packed.flatten(1)), _units_fields(scales)), 1)


def _pack_q4_k(levels: Tensor, scales: Scales) -> Tensor:
    halves = levels.view(-1, 4, 2, 32)
    packed = to_bytes((halves[:, :, 0] + 16 * halves[:, :, 1]).flatten(1))
    return torch.cat((_units_fields(scales), _pack_scales_6bit(scales.stored[1]), packed), 1)


def _pack_q5_k(levels: Tensor, scales: Scales) -> Tensor:
    high = (levels > 15).float()
    bits = high.view(-1, 8, 32)
    fifth = bits[:, 0] + 2 * bits[:, 1]
    for group in range(2, 8):
        fifth += 2**group * bits[:, group]
    halves = (levels - 16 * high).view(-1, 4, 2, 32)
    packed = to_bytes((halves[:, :, 0] + 16 * halves[:, :, 1]).flatten(1))
    integers = _pack_scales_6bit(scales.stored[1])
    return torch.cat((_units_fields(scales), integers, to_bytes(fifth), packed), 1)


def _values(units: Tensor, scales: Tensor, mins: Tensor, levels: Tensor) -> Tensor:
    """d·scale·level − dmin·min: units [n, 2], scales and mins [n, g], levels [n, 256]."""
    steps = (units[:, :1] * scales).unsqueeze(-1)
    offsets = (units[:, 1:] * mins).unsqueeze(-1)
    return (steps * levels.view(*scales.shape, -1) - offsets).flatten(1)


def _read_units(fields: Tensor) -> Tensor:
    return read_fp16(fields.reshape(-1, 2, 2)).squeeze(-1)


def _decode_q2_k(data: Tensor) -> Tensor:
    integers, packed, units = data.split((16, 64, 4), dim=1)
    quarters = packed.view(-1, 2, 1, 32)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=data.device).view(1, 1, 4, 1)
    levels = (quarters >> shifts) & 3
    return _values(_read_units(units), integers & 15, integers >> 4, levels.flatten(1))


def _nibbles(packed: Tensor) -> Tensor:
    """uint8 [n, 128] to levels [n, 256]: of every 64, the low nibbles come first."""
    pairs = packed.reshape(-1, 4, 1, 32)
    return torch.cat((pairs & 15, pairs >> 4), 2).flatten(1)


def _decode_q4_k(data: Tensor) -> Tensor:
    units, integers, packed = data.split((4, 12, 128), dim=1)
    return _values(_read_units(units), *_unpack_scales_6bit(integers), _nibbles(packed))


def _decode_q5_k(data: Tensor) -> Tensor:
    units, integers, fifth, packed = data.split((4, 12, 32, 128), dim=1)
    shifts = torch.arange(8, dtype=torch.uint8, device=data.device).view(1, 8, 1)
    high = (fifth.unsqueeze(1) >> shifts) & 1
    levels = _nibbles(packed) + 16 * high.flatten(1)
    return _values(_read_units(units), *_unpack_scales_6bit(integers), levels)


def _codec(
    shape: Shape, pack: Callable[[Tensor, Scales], Tensor], decode: Callable[[Tensor], Tensor]
) -> Codec:
    return Codec(
        fit=partial(fit, shape),
        round=partial(round_affine, top=shape.top),
        pack=pack,
        decode=decode,
        limit=shape.scale_top * FP16_MAX,
    )


CODECS: dict[str, Codec] = {
    "Q2_K": _codec(Shape(16, 3, 15), _pack_q2_k, _decode_q2_k),
    "Q4_K": _codec(Shape(32, 15, 63), _pack_q4_k, _decode_q4_k),
    "Q5_K": _codec(Shape(32, 31, 63), _pack_q5_k, _decode_q5_k),
}
