"""Means over scored tokens, and how far they can be trusted.

Owns: the mean, its two errors, percentiles. Leaves out: what is averaged.

Tokens of one window share a subject and a writer: their errors are not independent. Counting each
as a sample of its own, as llama-perplexity does, gives errors 2 to 7 times too small on the
built-in text. The error here is clustered: that of the mean over windows, which are the samples.
The error by tokens is kept beside it, to be compared with llama-perplexity's.

Source: standard error of a mean with clusters of equal size (Liang and Zeger 1986, with the factor
W/(W-1)).
"""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A figure, its standard error by windows, and the one that takes tokens as independent."""

    value: float
    stderr: float
    token_stderr: float

    def scaled(self, value: float, factor: float) -> "Estimate":
        """`value` with both errors times `factor`: of a function of this figure, first order."""
        return Estimate(value, factor * self.stderr, factor * self.token_stderr)


def mean(values: Tensor, windows: int) -> Estimate:
    """The mean of float64 (tokens,), which are of `windows` windows of one length, in their order.

    Of a single window only the error by tokens is known, and stands for both; of a single token
    it is 0.
    """
    by_token = _error(values)
    if windows < 2:
        return Estimate(float(values.mean()), by_token, by_token)
    by_window = _error(values.reshape(windows, -1).mean(1))
    return Estimate(float(values.mean()), by_window, by_token)


def exponential(mean_nll: Estimate) -> Estimate:
    """exp of an estimate, as PPL is of the mean negative log likelihood; at most infinite."""
    value = math.exp(mean_nll.value) if mean_nll.value < 700 else math.inf
    return mean_nll.scaled(value, value)


def percentile(values: Tensor, fraction: float) -> float:
    """The value at `fraction` of the way from least to greatest, linear between neighbours."""
    ordered = values.sort().values
    place = fraction * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (place - low) * (ordered[high] - ordered[low]))


def _error(samples: Tensor) -> float:
    """Standard error of the mean of independent samples; 0 for one."""
    n = len(samples)
    return float(samples.std(correction=0)) / math.sqrt(n - 1) if n > 1 else 0.0
