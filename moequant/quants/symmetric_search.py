"""Search for the steps of groups of values whose levels are symmetric or come from a codebook.

Owns: the weighted search shared by Q3_K, Q6_K, IQ4_NL and IQ4_XS, where a value is
`step * level`, and, for superblocks, `step = d * multiplier` with integer multipliers.
Leaves out: the codebooks and the bytes (`k_symmetric`, `nonlinear`), formats with an offset
(`k_asymmetric`).

What is minimised is the plain weighted error E = Σ w (s l - x)². ggml (`make_qx_quants`,
`make_q3_quants`, `quantize_row_iq4_nl_impl`) also weighs by the value itself; leaving that out,
trying both signs of the step, choosing multipliers by the error they really give, and solving for
d once more at the end is what makes the result better than ggml's.

With levels rounded from some trial step, A = Σ w x l and B = Σ w l² give everything: the best step
A/B, its gain A²/B over all zeros, and the gain s (2A - sB) of any other step s.

Values are held as columns, [groups, size, n blocks], and summed by halving, so that a block's
result does not depend on its neighbours (see `blocks`).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moequant.quants.blocks import through_fp16

TINY = 1e-30
# Gains that differ by rounding only are ties, and the first trial keeps them: groups of a constant
# row then agree on a step, and one d serves them all.
MARGIN = 1 + 1e-6


class Groups:
    """Values of n blocks, in groups that share a step, with their weights.

    x and weights: float32 [n, groups * size]; `nearest` turns x/step, float32 of any shape, into
    the nearest levels (it may overwrite its argument).
    """

    def __init__(
        self,
        x: Tensor,
        weights: Tensor | None,
        groups: int,
        nearest: Callable[[Tensor], Tensor],
    ) -> None:
        self.x = _columns(x, groups)
        self.weights = None if weights is None else _columns(weights, groups)
        self.weighted_x = self.x if self.weights is None else self.x * self.weights
        self.nearest = nearest
        products = self.x.new_empty(2, *self.x.shape)
        self._wxl, self._wll = products
        halves = [1 << bit for bit in reversed(range(self.x.shape[1].bit_length() - 1))]
        self._folds = [(products[:, :, :h], products[:, :, h : 2 * h]) for h in halves]
        self._sums = products[:, :, 0]

    def sums(self, inverses: Tensor) -> tuple[Tensor, Tensor]:
        """A = Σ w x l and B = Σ w l² per trial and group, for the levels nearest to x * inverse.

        inverses, A and B: float32 [trials, groups, n].
        """
        a_and_b = inverses.new_empty(len(inverses), 2, *inverses.shape[1:])
        for inverse, out in zip(inverses, a_and_b, strict=True):
            self._sum(inverse, out)
        return a_and_b[:, 0], a_and_b[:, 1]

    def _sum(self, inverse: Tensor, out: Tensor) -> None:
        """One trial. It all happens in two buffers, to stay in the cache."""
        levels = self.nearest(torch.mul(self.x, inverse[:, None], out=self._wll))
        torch.mul(levels, self.weighted_x, out=self._wxl)
        torch.mul(levels, levels, out=self._wll)
        if self.weights is not None:
            self._wll.mul_(self.weights)
        for kept, added in self._folds:
            kept.add_(added)
        out.copy_(self._sums)

    def error(self, step: Tensor) -> Tensor:
        """Σ w (step * l - x)² per group for the nearest levels, float32 [groups, n].

        Slower than what `sums` can tell, but right where the fit is so good that the difference
        of large sums says nothing.
        """
        levels = self.nearest(torch.mul(self.x, _inverse(step)[:, None], out=self._wll))
        off = torch.mul(levels, step[:, None], out=self._wxl).sub_(self.x).square_()
        return group_sum(off if self.weights is None else off.mul_(self.weights))

    def peak(self) -> Tensor:
        """The value of largest magnitude, with its sign, per group: float32 [groups, n]."""
        return signed_peak(self.x, 1)


def group_sum(x: Tensor) -> Tensor:
    """Sum over axis 1 (a power of two long) of [groups, size, n] by halving."""
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        x = x[:, :half] + x[:, half:]
    return x[:, 0]


def signed_peak(x: Tensor, dim: int) -> Tensor:
    """The value of largest magnitude along `dim`, with its sign."""
    high, low = x.amax(dim), x.amin(dim)
    return torch.where(high >= -low, high, low)


def best_steps(groups: Groups, peaks: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Each group's best step by itself, and its curvature B: both float32 [groups, n].

    Tries the steps that put the group's peak at each of the (fractional, signed) levels `peaks`,
    and solves for the step that fits the levels best. A group without weight gets the first of
    the trial steps and curvature 0.
    """
    peak = groups.peak()
    a, b = groups.sums(_inverse(peak) * _stacked(peaks, peak))
    step = a / b.clamp_min(TINY)
    gain = step * a
    gain[0] *= MARGIN
    step, curvature = _choose(gain, step, b)
    return torch.lerp(peak / peaks[0], step, (curvature > 0).float()), curvature


def best_stored_steps(groups: Groups, peaks: Sequence[float], finals: int) -> Tensor:
    """Each group's best step by itself, as fp16 stores it: float32 [groups, n].

    As `best_steps`, for every `finals`-th part of the peaks; the winners then compete on their
    true error, after all rounding.
    """
    parts = [
        peaks[len(peaks) * i // finals : len(peaks) * (i + 1) // finals] for i in range(finals)
    ]
    steps = torch.stack([through_fp16(best_steps(groups, part)[0]) for part in parts])
    errors = torch.stack([groups.error(step) for step in steps])
    return _choose(-errors, steps)[0]


def split_steps(
    step: Tensor, curvature: Tensor, low: int, high: int, peaks: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Common d and integer multipliers in low..high so that d * multiplier ≈ step.

    step, curvature: float32 [groups, n]. Returns d [n], which fp16 holds exactly, and multipliers
    [groups, n]. Tries d that put the largest step at each of `peaks` and are then solved for; the
    error of a step that is off by δ grows by curvature * δ². Groups without weight do not choose.
    """
    peak = signed_peak(step * (curvature > 0), 0)
    peak = torch.where(peak == 0, signed_peak(step, 0), peak)
    d = through_fp16(peak / _stacked(peaks, step)[:, 0])
    multiplier = (step * _inverse(d)[:, None]).round_().clamp_(low, high)
    if len(peaks) == 1:
        return d[0], multiplier[0]
    d = _solve(multiplier, step * curvature, curvature, d)
    multiplier = (step * _inverse(d)[:, None]).round_().clamp_(low, high)
    loss = group_sum((multiplier * d[:, None]).sub_(step).square_().mul_(curvature))
    d, multiplier = _choose(-loss[:, None], d[:, None], multiplier)
    return d[0], multiplier


def refine(
    groups: Groups, d: Tensor, multiplier: Tensor, low: int, high: int, offsets: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Try each group's neighbouring multipliers at their true error, then solve for d.

    d [n], multiplier [groups, n] and the result as in `split_steps`. `offsets` starts with 0.
    """
    trials = (multiplier + _stacked(offsets, multiplier)).clamp_(low, high)
    step = trials * d
    a, b = groups.sums(_inverse(step))
    gain = (a + a).sub_(step * b).mul_(step)
    multiplier, a, b = _choose(gain, trials, a, b)
    return _solve(multiplier[None], a, b, d[None])[0], multiplier


def _solve(multiplier: Tensor, a: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """fp16 d that minimises Σ_g b (d m)² - 2 a d m; the given d [trials, n] where that is no worse.

    multiplier: float32 [trials, groups, n]; a, b: float32 [groups, n].
    """
    along = group_sum(multiplier * a)
    square = group_sum(multiplier.square().mul_(b))
    solved = through_fp16(along / square.clamp_min(TINY))
    gain, old_gain = ((along + along - s * square) * s for s in (solved, d))
    return torch.lerp(d, solved, (gain > old_gain).float())


def _choose(gain: Tensor, *of: Tensor) -> list[Tensor]:
    """From each of the tensors [trials, ...], the trial with the largest gain, the first of equals.

    `lerp` with a weight of 0 or 1 selects exactly. It is vectorised on the CPU; `where`, `argmax`
    and `gather` are not, and take several times longer.
    """
    best, chosen = gain[0], [trials[0] for trials in of]
    for k in range(1, len(gain)):
        better = torch.gt(gain[k], best, out=torch.empty_like(best))
        best = torch.maximum(best, gain[k])
        chosen = [torch.lerp(chosen[i], trials[k], better) for i, trials in enumerate(of)]
    return chosen


def _inverse(step: Tensor) -> Tensor:
    """1/step, near enough for a search, and 0 where the step is 0."""
    return step / (step * step).add_(TINY)


def _stacked(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]


def _columns(x: Tensor, groups: int) -> Tensor:
    """[n, groups * size] to contiguous [groups, size, n]."""
    return x.t().contiguous().view(groups, -1, x.shape[0])
