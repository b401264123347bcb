"""The numbers that describe a layer's routing, from counts and weights.

Owns: their formulas. Leaves out: where counts come from (`watch`), and the run (`analysis`).

With n_e the routed tokens of expert e of E, p_e = n_e / Σ n its share, T the tokens, k chosen each:

    Gini            Σ_i (2i - E - 1)·p_(i) / E over ascending p; 0 = even, 1 - 1/E = one expert
    entropy         -Σ p ln p / ln E; 1 = even, 0 = one expert
    dead            n_e = 0
    dominant        n_e / T > min(4·k/E, (1 + k/E) / 2): four times an even use, or, where that is
                    hardly possible, more than halfway from an even use to every token
    specialisation  I(domain; expert) in bits, domains weighted alike: with P_d the shares of domain
                    d and M their mean, H(M) - mean_d H(P_d). This is the generalized
                    Jensen-Shannon divergence of the domains (Lin, "Divergence measures based on
                    the Shannon entropy", 1991); at most log2 of the number of domains.
    chance          the mean of the same over permutations of the domains' labels. A finite sample
                    has some divergence though nothing is specialised (Miller, "Note on the bias of
                    information estimates", 1955). Labels move with whole sequences, since a
                    sequence's tokens are alike: a bias correction that counts tokens as
                    independent would be too small. Where domains do differ this is an upper bound,
                    since the permuted ones then differ too.
    specialists     expert e and domain d whose part P_d(e)·log2(P_d(e) / M(e)) / D of the sum above
                    exceeds what the largest part of any pair is in 19 of 20 permutations (Westfall
                    and Young, "Resampling-based multiple testing", 1993: so in a layer without
                    specialisation none is named 19 times of 20). `ratio` = P_d(e) / M(e).
    sequences       At least 4 of each domain are needed to name anybody. Of D domains with n each,
                    up to D²/C(D·n, n) of the permutations leave a domain's sequences together, and
                    its part as large as it is. With n = 4 that is under 1 in 20, so that this rule
                    can be met; with n = 3 it is not for 2 to 5 domains; with n = 1 all of them do.
    cosine          of two experts: all their weights (gate, up, down) as one vector. Experts made
                    of copies of one MLP begin at 1, random ones at 0. It does not see that two
                    experts compute the same with their inner columns in another order.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

PERMUTATIONS = 200
DOMINANT = 4.0  # times an even use
SPECIALISTS = 5  # named per layer
LEAST_SEQUENCES = 4  # of each domain
_CONFIDENCE = 0.95
_ROUNDING = 1e-12  # bits; the same sum in another order
_COLUMNS = 1 << 24  # weights in float32 at once


@dataclass(frozen=True)
class Specialist:
    """An expert that a domain uses `ratio` times as much as the domains do on average."""

    expert: int
    domain: str
    ratio: float


@dataclass(frozen=True)
class Specialisation:
    """`domain_share[name]`: shares of the experts, (experts,) float64; `bits`, `chance_bits`.

    `enough`: every domain has `LEAST_SEQUENCES`; nobody is named in `specialists` otherwise.
    """

    domain_share: dict[str, Tensor]
    bits: float
    chance_bits: float
    enough: bool
    specialists: tuple[Specialist, ...]


@dataclass(frozen=True)
class Cosine:
    """Over all pairs of experts: the mean, the largest, and the pair that has it."""

    mean: float
    max: float
    pair: tuple[int, int]


def gini(share: Tensor) -> float:
    """Gini coefficient of non-negative values (n,) with a sum above 0."""
    n = len(share)
    ordered = share.double().sort().values
    weights = 2 * torch.arange(1, n + 1, dtype=torch.float64) - n - 1
    return float(weights @ ordered / (n * ordered.sum()))


def normalised_entropy(share: Tensor) -> Tensor:
    """-Σ p ln p / ln n over the last axis (..., n) of probabilities; 1 for a single value."""
    n = share.shape[-1]
    if n == 1:
        return torch.ones(share.shape[:-1], dtype=share.dtype)
    entropy: Tensor = torch.special.entr(share).sum(-1) / math.log(n)
    return entropy


def dead(counts: Tensor) -> list[int]:
    """Experts without a token."""
    found: list[int] = (counts == 0).nonzero().flatten().tolist()
    return found


def dominant(counts: Tensor, tokens: int, used: int) -> list[int]:
    """Experts that get more tokens than the rule above allows, of `tokens` with `used` each."""
    even = used / len(counts)
    limit = min(DOMINANT * even, (1 + even) / 2)
    found: list[int] = (counts.double() / tokens > limit).nonzero().flatten().tolist()
    return found


def specialisation(
    counts: Tensor, labels: Tensor, names: list[str], seed: int = 0
) -> Specialisation:
    """How much the domains differ in the experts they use.

    `counts` (sequences, experts): tokens of each sequence routed to each expert; `labels`
    (sequences,) int64: which of `names` a sequence belongs to, every one at least once.
    """
    share, parts = _divergence(counts, labels[None], len(names))
    share, parts = share[0], parts[0]
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(labels), generator=generator) for _ in range(PERMUTATIONS)]
    _, by_chance = _divergence(counts, labels[torch.stack(orders)], len(names))
    limit = by_chance.flatten(1).amax(1).quantile(_CONFIDENCE)
    enough = int(labels.bincount().min()) >= LEAST_SEQUENCES
    above = [tuple(at) for at in (parts > limit + _ROUNDING).nonzero().tolist() if enough]
    above.sort(key=lambda pair: -float(parts[pair]))
    mean = share.mean(0)
    return Specialisation(
        domain_share=dict(zip(names, share, strict=True)),
        bits=float(parts.sum()),
        chance_bits=float(by_chance.sum((1, 2)).mean()),
        enough=enough,
        specialists=tuple(
            Specialist(expert, names[domain], float(share[domain, expert] / mean[expert]))
            for domain, expert in above[:SPECIALISTS]
        ),
    )


def _divergence(counts: Tensor, labels: Tensor, domains: int) -> tuple[Tensor, Tensor]:
    """Shares by domain and their parts of the divergence in bits, for each row of `labels`.

    `labels` (n, sequences); both results (n, domains, experts) float64.
    """
    member = torch.nn.functional.one_hot(labels, domains).double()
    share = torch.einsum("nsd,se->nde", member, counts.double())
    share /= share.sum(-1, keepdim=True)
    mean = share.mean(1, keepdim=True)
    log2_ratio = torch.where(share > 0, share / mean, 1.0).log2()
    return share, share * log2_ratio / domains


@torch.inference_mode()
def cosine_between_experts(weights: Iterable[Tensor]) -> Cosine | None:
    """Pairwise cosines of experts whose weights are the rows of `weights`, each (experts, ...).

    Sums are taken over slices of columns, so that memory stays bounded. An expert that is all zeros
    has a cosine of 0 with the others. None for a single expert.
    """
    gram = torch.zeros(1, dtype=torch.float64)
    for weight in weights:
        rows = weight.flatten(1)
        for part in rows.split(max(1, _COLUMNS // len(rows)), dim=1):
            values = part.float()
            gram = gram + (values @ values.T).double().cpu()
    n = len(gram)
    if n < 2:
        return None
    norms = gram.diagonal().sqrt()
    cosines = torch.nan_to_num(gram / norms / norms[:, None]).clamp(-1, 1)
    first, second = torch.triu_indices(n, n, 1)
    pairs = cosines[first, second]
    most = int(pairs.argmax())
    return Cosine(float(pairs.mean()), float(pairs[most]), (int(first[most]), int(second[most])))
