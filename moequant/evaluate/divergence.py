"""How far one model's predictions are from another's, token by token.

Owns: KL divergence, agreement and probability shifts from logits that come in slices of the
vocabulary, and their means, errors and percentiles. Leaves out: the forward passes (`compare`).

Definitions are llama-perplexity's (`tools/perplexity/perplexity.cpp`, `kl_divergence()`), for each
scored token, with P the reference and Q the model:

    KLD = Σ_v P(v) · (ln P(v) - ln Q(v))      Δp = Q(t) - P(t) of the token t that follows
    same top: argmax Q = argmax P             ln PPL(Q)/PPL(P) = mean of nll_Q - nll_P

What differs: llama-perplexity stores P in 16 bits and leaves out tokens with ln P under -16; here
both are exact, so that equal models have a KLD of 0. And errors are clustered by window, with
llama-perplexity's beside them (`statistics`); that of the PPL ratio is the paired one.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from moequant.evaluate.statistics import Estimate, exponential, mean, percentile

Logits = Iterable[tuple[int, int, Tensor]]
"""As `StreamedModel.logits` yields them: first position, first token id, (positions, ids)."""

HISTOGRAM_BINS = 40
_LEAST_KLD = 1e-8  # the histogram's lower end; what is below counts in the first bin


@dataclass(frozen=True)
class Divergence:
    """Of each scored token, by window: `kld`, `nll`, `reference_nll` in nats and `delta_p`, float64
    (tokens,), and `same_top`, bool (tokens,). `windows`: how many, all of one length."""

    windows: int
    kld: Tensor
    nll: Tensor
    reference_nll: Tensor
    delta_p: Tensor
    same_top: Tensor

    @property
    def tokens(self) -> int:
        return len(self.kld)

    @property
    def perplexity(self) -> Estimate:
        return exponential(mean(self.nll, self.windows))

    @property
    def reference_perplexity(self) -> Estimate:
        return exponential(mean(self.reference_nll, self.windows))

    @property
    def mean_kld(self) -> Estimate:
        return mean(self.kld, self.windows)

    @property
    def ppl_ratio(self) -> Estimate:
        """PPL(Q)/PPL(P), with the paired error: the tokens are the same."""
        return exponential(mean(self.nll - self.reference_nll, self.windows))

    @property
    def mean_delta_p(self) -> Estimate:
        return mean(self.delta_p, self.windows)

    @property
    def rms_delta_p(self) -> Estimate:
        """sqrt of the mean of Δp²; its error to first order."""
        squares = mean(self.delta_p.square(), self.windows)
        rms = math.sqrt(squares.value)
        return squares.scaled(rms, 0.5 / rms if rms else 0.0)

    @property
    def agreement(self) -> Estimate:
        """Share of tokens with the same most likely token."""
        return mean(self.same_top.double(), self.windows)

    def kld_percentile(self, fraction: float) -> float:
        """The KLD that a `fraction` of the tokens stays under."""
        return percentile(self.kld, fraction)

    def kld_histogram(self) -> tuple[list[float], list[int]]:
        """Edges (bins + 1,), evenly spaced in the logarithm, and the tokens in each bin."""
        top = max(float(self.kld.max()), 10 * _LEAST_KLD) * (1 + 1e-9)
        edges = torch.logspace(
            math.log10(_LEAST_KLD), math.log10(top), HISTOGRAM_BINS + 1, dtype=torch.float64
        )
        bins = torch.bucketize(self.kld.clamp(_LEAST_KLD, top), edges[1:-1], right=True)
        return edges.tolist(), torch.bincount(bins, minlength=HISTOGRAM_BINS).tolist()


@torch.inference_mode()
def diverge(reference: Logits, model: Logits, targets: Tensor, windows: int = 1) -> Divergence:
    """Compare two models' logits for the same positions; `targets` are the tokens that follow.

    The positions are those of `windows` windows of one length, in order.
    Both are read in step, one slice of each in memory. KLD = E_P[a - b] - (A - B) with a, b the
    logits and A, B the logarithms of the sums of their exponentials, all taken along the slices.
    """
    p, q = TokenScores(targets), TokenScores(targets)
    expected = torch.zeros(targets.shape, dtype=torch.float64)  # E_P[a - b] of what has been read
    for (first, start, a32), (_, _, b32) in zip(reference, model, strict=True):
        here = slice(first, first + len(a32))
        a, b = a32.double(), b32.double()
        before = p.total[here].clone()
        p.add(here, start, a)
        q.add(here, start, b)
        after = p.total[here].to(a.device)
        share = (before.to(a.device) - after).exp()
        inside = ((a - after[:, None]).exp() * (a - b)).sum(-1)
        expected[here] = (expected[here].to(a.device) * share + inside).cpu()
    return Divergence(
        windows=windows,
        kld=expected - (p.total - q.total),
        nll=q.nll,
        reference_nll=p.nll,
        delta_p=(-q.nll).exp() - (-p.nll).exp(),
        same_top=p.top == q.top,
    )


class TokenScores:
    """Of one model, per position: log Σ exp, the logit of the target, the most likely token."""

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets
        self.total = torch.full(targets.shape, -math.inf, dtype=torch.float64)
        self.hit = torch.zeros_like(self.total)
        self.best = torch.full_like(self.total, -math.inf)
        self.top = torch.zeros(targets.shape, dtype=torch.int64)

    @property
    def nll(self) -> Tensor:
        return self.total - self.hit

    def add(self, here: slice, start: int, logits: Tensor) -> None:
        """Logits (positions, ids) in float64 of the positions `here`, ids from `start` on."""
        self.total[here] = torch.logaddexp(self.total[here], logits.logsumexp(-1).cpu())
        best, top = (part.cpu() for part in logits.max(-1))
        better = best > self.best[here]
        self.best[here] = torch.where(better, best, self.best[here])
        self.top[here] = torch.where(better, top + start, self.top[here])
        column = self.targets[here] - start
        inside = ((column >= 0) & (column < logits.shape[1])).nonzero().flatten()
        self.hit[here][inside] = logits[inside, column[inside]].cpu()
